"""Storage of runs: local directories, or folders in Google Cloud Storage buckets.

Buckets lack appending, and paths that any library can open; this module provides both through local
copies. Orbax itself writes checkpoints to either.
"""

import contextlib
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from pals_jax.runtime.errors import Unavailable, UserError, reason


def workdir(text: str) -> epath.Path:
    """The workdir of that name: a directory, or `gs://BUCKET/DIR`.

    Raises:
        UserError: if it is neither, or it is in a bucket and gcsfs is not installed.
    """
    if not text.startswith("gs://"):
        if "://" in text:
            raise UserError(f"{text} is neither a directory nor gs://BUCKET/DIR; name one of them.")
        return epath.Path(text).expanduser()  # shells do not expand ~ after "--workdir="
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} is in a bucket, which needs gcsfs: pip install gcsfs.")
    import fsspec  # only buckets need it

    os.environ["EPATH_USE_TF"] = "false"  # otherwise etils uses TensorFlow if it is installed
    # Otherwise gcsfs queries another service for the bucket's type before each access.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Cached listings would hide files that Orbax and other hosts write later.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # gcsfs logs tracebacks of errors that it also raises and that we report.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return epath.Path(text)


def in_bucket(path: epath.Path) -> bool:
    """Whether the path is in a bucket rather than on this machine."""
    return str(path).startswith("gs://")


def absolute(path: epath.Path) -> epath.Path:
    """The absolute path; bucket paths already are, and `resolve` would make them local paths."""
    return path if in_bucket(path) else path.resolve()


def check(path: epath.Path) -> None:
    """Checks that the bucket of a path exists, if the path is in one.

    Raises:
        UserError: if it does not exist, or access is denied.
    """
    with reported(path):
        if in_bucket(path) and not epath.Path(*path.parts[:3]).exists():
            raise FileNotFoundError("there is no such bucket")


@contextlib.contextmanager
def reported(path: epath.Path) -> Iterator[None]:
    """Turns errors about a path in a bucket into one sentence.

    An `OSError` about a local path passes through; the command line reports it.

    Raises:
        Unavailable: if the bucket does not respond.
        UserError: if the bucket does not exist, or access is denied.
    """
    try:
        yield
    except Exception as error:  # gcsfs and the libraries below it raise many types
        if not in_bucket(path):
            raise
        raise kind_of(error)(
            f"{path} cannot be read or written ({reason(error)}); check that its bucket exists and"
            " that this machine's account may use it."
        ) from error


def kind_of(error: Exception) -> type[UserError]:
    """`Unavailable` if a later attempt at the same access may succeed, else `UserError`."""
    if importlib.util.find_spec("gcsfs") is None:
        return UserError
    from gcsfs.retry import is_retriable

    # The pattern matches errors of tensorstore, through which Orbax writes arrays.
    later = is_retriable(error) or re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b", str(error))
    return Unavailable if later else UserError


@contextlib.contextmanager
def replacing(path: Path | epath.Path) -> Iterator[Path]:
    """Where to write a file or directory of this machine that then replaces `path` atomically.

    It is in a temporary folder beside `path`, and is renamed when the context ends. An exception
    leaves `path` unchanged; a killed process leaves a folder `building-*`, which is never read.

    Raises:
        OSError: if it cannot be renamed, for example to a directory that is not empty.
    """
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as aside:
        built = Path(aside) / path.name
        yield built
        built.replace(path)


def write_text(path: Path | epath.Path, text: str) -> None:
    """Writes a file atomically, so that concurrent readers and crashes never see a partial file.

    Raises:
        UserError: see `reported`.
    """
    if in_bucket(path):  # object stores show a file only once it is complete
        with reported(path):
            path.write_text(text)
        return
    with replacing(path) as part:
        part.write_text(text)


class Staged:
    """A directory for writers that need local paths, or append to files.

    Files are written to `path`: the directory itself, or, if that is in a bucket, a local one from
    which `deliver` and the end of the context upload them.
    """

    def __init__(self, directory: epath.Path) -> None:
        """Creates a local directory if `directory` is in a bucket."""
        self._directory = directory
        self._aside = tempfile.TemporaryDirectory() if in_bucket(directory) else None
        self.path = Path(self._aside.name if self._aside else directory)

    def deliver(self) -> None:
        """Uploads all files to the bucket, if there is one.

        Raises:
            UserError: if the upload fails.
        """
        if self._aside is None:
            return
        with reported(self._directory):
            for path in files(self.path):
                to = self._directory / path.relative_to(self.path)
                to.write_bytes(path.read_bytes())

    def __enter__(self) -> "Staged":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # Upload even after an exception, without hiding that exception.
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.deliver()
        if self._aside:
            self._aside.cleanup()


@contextlib.contextmanager
def fetched(directory: epath.Path) -> Iterator[Path]:
    """A local directory for readers: the directory itself, or a copy if it is in a bucket."""
    if not in_bucket(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as aside:
        with reported(directory):
            for path in files(directory):
                to = Path(aside) / path.relative_to(directory)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(path.read_bytes())
        yield Path(aside)


def files(directory: epath.Path) -> Iterator[epath.Path]:
    """All files below a directory."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from files(path)
        else:
            yield path
