"""Sources of examples: TensorFlow Datasets, GLUE's official files, or the user's files."""

from pathlib import Path
from typing import Protocol

from pals_jax.data.examples import Examples
from pals_jax.data.glue_dir import GlueDir
from pals_jax.data.tasks import Task
from pals_jax.data.tfds import Tfds
from pals_jax.runtime.errors import UserError


class Source(Protocol):
    """A source of tasks' examples."""

    def splits(self, task: Task) -> tuple[str, ...]:
        """The task's splits that are present."""
        ...

    def is_here(self, task: Task) -> bool:
        """Whether the task's examples can be read without a download."""
        ...

    def read(self, task: Task, split: str) -> Examples:
        """The examples of a split.

        Raises:
            UserError: if the split or its data are missing or invalid.
        """
        ...


def source_of(kind: str, directory: str | Path | None = None) -> Source:
    """A source of known tasks; for user-defined tasks see `own_tasks.own_task`.

    Args:
        kind: "glue_dir", GLUE's official files in `directory`, or "tfds", TensorFlow Datasets.
        directory: the directory of the files; for "tfds" its data directory, None for its default.

    Raises:
        UserError: if there is no such kind or directory.
    """
    if kind == "tfds":
        return Tfds(None if directory is None else Path(directory))
    if kind != "glue_dir":
        raise UserError(f"there is no data source {kind!r}; there are glue_dir and tfds.")
    if directory is None:
        raise UserError("the data source glue_dir needs the directory of the GLUE files.")
    return GlueDir(Path(directory))
