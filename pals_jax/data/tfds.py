"""GLUE, XSum and WMT16 from TensorFlow Datasets, without TensorFlow."""

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pals_jax.data.examples import Examples, check_split
from pals_jax.data.tasks import GLUE, TEXT_TASKS, Task
from pals_jax.runtime.errors import Unavailable, UserError

_ANSWER_SECONDS = 20  # timeout for a response from the data server, at each attempt
_TRIES = 3

# The name of each task's dataset.
_DATASETS = {name: f"glue/{name}" for name in GLUE} | {
    "xsum": "xsum",
    "wmt16_enro": "wmt16_translate/ro-en",
}


@dataclasses.dataclass(frozen=True)
class Tfds:
    """The known tasks of TensorFlow Datasets, downloaded and prepared at first use.

    They are kept as ArrayRecord, the format of TFDS that needs no TensorFlow. TFDS's own column
    names and class ids are those of `tasks.GLUE` and `tasks.TEXT_TASKS`; its texts are those of the
    official files. XSum is not downloaded: TFDS takes it from its manual directory, and says what
    must lie there.

    Attributes:
        data_dir: TFDS's data directory; None means its default.
    """

    data_dir: Path | None = None

    def splits(self, task: Task) -> tuple[str, ...]:
        """All of the task's splits."""
        _check_known(task)
        return task.splits

    def is_here(self, task: Task) -> bool:
        """See `sources.Source`."""
        return bool(self._builder(task).is_prepared())

    def read(self, task: Task, split: str) -> Examples:
        """The examples of a split; see `sources.Source`.

        Raises:
            UserError: as for `sources.Source`, or if the download fails.
        """
        _check_known(task)
        check_split(task, split)
        source = self._prepared(task).as_data_source(split.replace("dev", "validation"))
        # One call for all rows is twice as fast as iterating.
        rows = source.__getitems__(range(len(source)))
        if task.name in GLUE:
            # TFDS has shuffled them; `idx` is the row number, for MRPC's train and validation that
            # in the file they were both taken from.
            rows = sorted(rows, key=lambda row: row["idx"])
        texts = [tuple(row[name].decode() for name in task.text) for row in rows]
        if task.output == "text":
            return Examples(texts, None, [row[task.target].decode() for row in rows])
        if split in task.test_splits:  # TFDS labels these -1
            return Examples(texts, None)
        targets = np.array([row["label"] for row in rows], np.float32)
        if task.is_regression:
            targets = np.array([task.label_to_target(label) for label in targets], np.float32)
        return Examples(texts, targets)

    def _builder(self, task: Task) -> Any:
        # Imported lazily because it is slow; importing the module registers its builders with TFDS.
        import tensorflow_datasets

        if task.name in GLUE:
            import tensorflow_datasets.text.glue
        elif task.name == "xsum":
            import tensorflow_datasets.summarization.xsum
        else:
            import tensorflow_datasets.translate.wmt16
        return tensorflow_datasets.builder(
            _DATASETS[task.name], data_dir=self.data_dir, file_format="array_record"
        )

    def _prepared(self, task: Task) -> Any:
        import requests
        import tensorflow_datasets

        dataset = _DATASETS[task.name]
        try:
            builder = self._builder(task)
            if not builder.is_prepared():
                where = self.data_dir or "its default data directory"
                print(
                    f"downloading {dataset} with TensorFlow Datasets to {where}; giving up"
                    f" after {_TRIES * _ANSWER_SECONDS} s without an answer",
                    file=sys.stderr,
                )
            # TFDS prints its progress; standard output is for results.
            with contextlib.redirect_stdout(sys.stderr), bounded(), _files_of_xsum():
                builder.download_and_prepare()
        except Exception as error:  # TFDS, its downloader and the network raise many types
            where = self.data_dir or "its default data directory"
            elsewhere = (
                ConnectionError,
                TimeoutError,
                requests.RequestException,
                tensorflow_datasets.download.DownloadError,
            )
            kind = Unavailable if isinstance(error, elsewhere) else UserError
            raise kind(
                f"TensorFlow Datasets cannot prepare {dataset} in {where}:"
                f" {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        return builder


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limits how long TFDS waits for a server and how often it retries.

    Otherwise TFDS makes eleven attempts without a timeout, which takes minutes without a network.
    Files that it has downloaded before need no server.
    """
    from tensorflow_datasets.core.download import downloader

    before = downloader._open_url, downloader.MAX_RETRIES
    downloader._open_url = functools.partial(downloader._open_url, timeout=_ANSWER_SECONDS)
    downloader.MAX_RETRIES = _TRIES - 1
    try:
        yield
    finally:
        downloader._open_url, downloader.MAX_RETRIES = before


@contextlib.contextmanager
def _files_of_xsum() -> Iterator[None]:
    """Has XSum's builder open files without TensorFlow, of which it uses nothing else.

    The other builders need no such help.
    """
    xsum = sys.modules.get("tensorflow_datasets.summarization.xsum")
    if xsum is None or importlib.util.find_spec("tensorflow"):
        yield
        return
    before, gfile = xsum.tf, SimpleNamespace(GFile=open, exists=lambda path: Path(path).exists())
    xsum.tf = SimpleNamespace(io=SimpleNamespace(gfile=gfile))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        xsum.tf = before  # type: ignore[attr-defined]


def _check_known(task: Task) -> None:
    if task.name not in _DATASETS:
        raise UserError(
            f"{task.name} is not a GLUE task; TFDS is only used for tasks of GLUE,"
            f" {' and '.join(TEXT_TASKS)}."
        )
