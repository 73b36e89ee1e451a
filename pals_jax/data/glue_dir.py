"""GLUE in its official layout: a folder of TSV files per task."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pals_jax.data.examples import Examples, check_split, read_examples
from pals_jax.data.tasks import Task
from pals_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The location and columns of a task's files.

    Attributes:
        folder: the folder of the task.
        columns: maps the task's column names to the files', where they differ.
        files: the file names of splits that are not named after the split.
        headers: the columns of files without a header line.
    """

    folder: str
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


_COLA = ("source", "label", "mark", "sentence")
_NLI = {"premise": "sentence1", "hypothesis": "sentence2"}
_LAYOUTS = {
    "cola": _Layout("CoLA", headers={"train": _COLA, "dev": _COLA}),
    "sst2": _Layout("SST-2"),
    "mrpc": _Layout(
        "MRPC", {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}
    ),
    "stsb": _Layout("STS-B", {"label": "score"}),
    "qqp": _Layout("QQP", {"label": "is_duplicate"}),
    "mnli": _Layout("MNLI", {**_NLI, "label": "gold_label"}),
    "qnli": _Layout("QNLI"),
    "rte": _Layout("RTE"),
    "wnli": _Layout("WNLI"),
    "ax": _Layout("diagnostic", _NLI, files={"test": "diagnostic.tsv"}),
}


@dataclasses.dataclass(frozen=True)
class GlueDir:
    """The GLUE tasks in a directory as GLUE's own download script leaves it.

    A ragged row is an error; the first release of QQP has some, the current QQP-clean has none.

    Raises:
        UserError: if there is no such directory.
    """

    directory: Path

    def __post_init__(self) -> None:
        """Fails early."""
        if not self.directory.is_dir():
            raise UserError(f"there is no GLUE directory {self.directory}.")

    def splits(self, task: Task) -> tuple[str, ...]:
        """The task's splits that have a file here."""
        return tuple(split for split in task.splits if self._path(task, split).is_file())

    def is_here(self, task: Task) -> bool:
        """See `sources.Source`."""
        del task
        return True

    def read(self, task: Task, split: str) -> Examples:
        """The examples of a split; see `sources.Source`."""
        check_split(task, split)
        layout = _layout(task)
        return read_examples(
            self._path(task, split),
            task,
            labelled=split not in task.test_splits,
            columns=layout.columns,
            header=layout.headers.get(split),
        )

    def _path(self, task: Task, split: str) -> Path:
        layout = _layout(task)
        return self.directory / layout.folder / layout.files.get(split, f"{split}.tsv")


def _layout(task: Task) -> _Layout:
    if task.name not in _LAYOUTS:
        raise UserError(
            f"{task.name} is not a task of GLUE's directory layout, which has"
            f" {', '.join(_LAYOUTS)}."
        )
    return _LAYOUTS[task.name]
