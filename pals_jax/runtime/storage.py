"""Where runs live: directories of this machine, or folders of a bucket of Google Cloud Storage.

What a bucket has not, appending and paths that any library opens, is made up for here. Checkpoints
are written to either by Orbax itself.
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
        UserError: it is neither, or what reaches a bucket is not installed.
    """
    if not text.startswith("gs://"):
        if "://" in text:
            raise UserError(f"{text} is neither a directory nor gs://BUCKET/DIR; name one of them.")
        return epath.Path(text).expanduser()  # no shell does it behind "--workdir="
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} is in a bucket, which takes gcsfs: pip install gcsfs.")
    import fsspec  # few runs are in a bucket

    os.environ["EPATH_USE_TF"] = "false"  # or TensorFlow, where it is installed, would take over
    # Or gcsfs asks another service what kind of bucket it is, before each look at one.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # What it listed once would hide what Orbax and other hosts write.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # It logs the tracebacks of failures that it raises as well, and we report.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return epath.Path(text)


def in_bucket(path: epath.Path) -> bool:
    """Whether it is no path of this machine."""
    return str(path).startswith("gs://")


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root on; that in a bucket is, and `resolve` would make it one from here."""
    return path if in_bucket(path) else path.resolve()


def check(path: epath.Path) -> None:
    """Sees that the bucket is there, if the path is in one.

    Raises:
        UserError: it is not, or does not let us look.
    """
    with reported(path):
        if in_bucket(path) and not epath.Path(*path.parts[:3]).exists():
            raise FileNotFoundError("there is no such bucket")


@contextlib.contextmanager
def reported(path: epath.Path) -> Iterator[None]:
    """Reports what goes wrong with a path in a bucket, as one sentence.

    What a directory of this machine raises is an `OSError`, and left to the command line.

    Raises:
        Unavailable: it does not answer.
        UserError: it is not there, or not for us.
    """
    try:
        yield
    except Exception as error:  # gcsfs and what is below it raise many kinds
        if not in_bucket(path):
            raise
        raise kind_of(error)(
            f"{path} cannot be read or written ({reason(error)}); see that its bucket exists, and"
            " that the account of this machine may use it."
        ) from error


def kind_of(error: Exception) -> type[UserError]:
    """Whether what failed so on its way to a bucket may go well later."""
    if importlib.util.find_spec("gcsfs") is None:
        return UserError
    from gcsfs.retry import is_retriable

    # The second is what tensorstore says, through which Orbax writes arrays.
    later = is_retriable(error) or re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b", str(error))
    return Unavailable if later else UserError


@contextlib.contextmanager
def replacing(path: Path | epath.Path) -> Iterator[Path]:
    """Where to write what shall be at `path` of this machine as a whole, a file or a directory.

    It is in a folder beside `path`, and takes its place at the end of the context. When that is
    left by an exception nothing has changed; a process that is killed leaves a folder
    `building-*`, which nothing reads.

    Raises:
        OSError: it cannot take its place: there is no room, or a directory with other files there.
    """
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as aside:
        built = Path(aside) / path.name
        yield built
        built.replace(path)


def write_text(path: Path | epath.Path, text: str) -> None:
    """Writes a file as a whole: who reads it meanwhile, or after a crash, sees no half of it.

    Raises:
        UserError: see `reported`.
    """
    if in_bucket(path):  # where nothing is seen of what is not whole
        with reported(path):
            path.write_text(text)
        return
    with replacing(path) as part:
        part.write_text(text)


class Staged:
    """A directory to write to for what can only write to this machine, or appends.

    Its files are written to `path`: the directory itself, or, where that is in a bucket, one on
    this machine, from which `deliver` and the end of the context copy them there, whole.
    """

    def __init__(self, directory: epath.Path) -> None:
        """Makes it if need be."""
        self._directory = directory
        self._aside = tempfile.TemporaryDirectory() if in_bucket(directory) else None
        self.path = Path(self._aside.name if self._aside else directory)

    def deliver(self) -> None:
        """Brings all files to where they belong.

        Raises:
            UserError: the bucket does not take them.
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
        # What is there is brought to its place, whatever has happened.
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.deliver()
        if self._aside:
            self._aside.cleanup()


@contextlib.contextmanager
def fetched(directory: epath.Path) -> Iterator[Path]:
    """A directory for what can only read this machine: itself, or a copy of one in a bucket."""
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
