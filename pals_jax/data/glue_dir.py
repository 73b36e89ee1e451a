"""GLUE in its official layout: a folder of TSV files per task."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pals_jax.data.examples import Examples, check_split, read_examples
from pals_jax.data.tasks import Task
from pals_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where a task lies.

    Attributes:
        folder: its folder.
        columns: the files' own names of the task's columns, where they differ.
        files: the file names of splits, where they are not the split's.
        headers: the columns of files that have no header line.
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

    A ragged row is an error. The first release of QQP has some; the present one, QQP-clean, has
    none.

    Raises:
        UserError: there is no such directory.
    """

    directory: Path

    def __post_init__(self) -> None:
        """Fails early."""
        if not self.directory.is_dir():
            raise UserError(f"there is no GLUE directory {self.directory}.")

    def splits(self, task: Task) -> tuple[str, ...]:
        """Those of the task's splits whose files are present."""
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
