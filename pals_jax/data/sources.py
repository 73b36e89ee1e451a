"""Where examples come from: TensorFlow Datasets, GLUE's own files, or files of your own."""

from pathlib import Path
from typing import Protocol

from pals_jax.data.examples import Examples
from pals_jax.data.glue_dir import GlueDir
from pals_jax.data.tasks import Task
from pals_jax.data.tfds import Tfds
from pals_jax.runtime.errors import UserError


class Source(Protocol):
    """Where the examples of tasks come from."""

    def splits(self, task: Task) -> tuple[str, ...]:
        """Those of the task's splits that are present."""
        ...

    def is_here(self, task: Task) -> bool:
        """Whether they can be read without a download."""
        ...

    def read(self, task: Task, split: str) -> Examples:
        """The examples of a split.

        Raises:
            UserError: the split or its data is missing or wrong.
        """
        ...


def glue_source(kind: str, directory: str | Path | None = None) -> Source:
    """A source of the GLUE tasks; for a task of your own see `files.own_task`.

    Args:
        kind: "glue_dir", the official files in `directory`, or "tfds", TensorFlow Datasets.
        directory: for "tfds" its data directory, None for its default.

    Raises:
        UserError: there is no such kind or directory.
    """
    if kind == "tfds":
        return Tfds(None if directory is None else Path(directory))
    if kind != "glue_dir":
        raise UserError(f"there is no data source {kind!r}; there are glue_dir and tfds.")
    if directory is None:
        raise UserError("the data source glue_dir needs the directory of the GLUE files.")
    return GlueDir(Path(directory))
