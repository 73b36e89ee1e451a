"""The sources of a call: several short ones share a row, as the examples of a training step do.

Dimension letters: see `pals_jax.models.layers`; N sources in R rows of J positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.data.packing import Packed


class Sources(NamedTuple):
    """What texts are generated for: at most N sources, in at most R rows of one task each.

    Attributes:
        input_ids: int [R, J]; of the rows.
        segment_ids: int [R, J]; 0 at padding, else, from 1, which of its row's sources a position
            belongs to.
        first: int [R, M]; the position of the first token of each source of a row.
        rows: int scalar; how many rows there are, the first ones.
        row: int [N]; the row of each source, R if there is no such source.
        segment: int [N]; which of its row's sources it is, from 1.
        start: int [N]; the token that each text begins with.
        present: int scalar; how many of the N sources there are, the first ones.
        task_ids: int, the task of all, or of each source, [N].
    """

    input_ids: Array | np.ndarray
    segment_ids: Array | np.ndarray
    first: Array | np.ndarray
    rows: Array | np.ndarray
    row: Array | np.ndarray
    segment: Array | np.ndarray
    start: Array | np.ndarray
    present: Array | np.ndarray
    task_ids: Array | np.ndarray

    @classmethod
    def packed(
        cls,
        texts: Sequence[Sequence[int] | np.ndarray],
        start: np.ndarray,
        task_ids: np.ndarray,
        count: int,
        packing: Packed,
        pad: int,
    ) -> "Sources":
        """Packs sources into as few rows as possible.

        Args:
            texts: the tokens of each source.
            start: int [n]; see above.
            task_ids: int, a scalar or [n]; see above.
            count: N.
            packing: packs into R rows of J positions, which hold the sources.
            pad: the token of padding.
        """
        (shape,), present = packing.shapes, len(texts)
        ids, segment_ids = np.full(shape, pad, np.int32), np.zeros(shape, np.int32)
        first = np.zeros((shape.rows, shape.length // packing.least), np.int32)
        row, segment = np.full(count, shape.rows, np.int32), np.zeros(count, np.int32)
        if present:
            lengths = np.array([len(text) for text in texts])
            (placed,) = packing.place((np.broadcast_to(task_ids, present), lengths))
            row[:present], segment[:present] = placed.row, placed.slot + 1
            first[placed.row, placed.slot] = placed.start
            places = zip(texts, placed.row, placed.start, placed.slot, strict=True)
            for text, at, begin, slot in places:
                here = at, slice(begin, begin + len(text))
                ids[here], segment_ids[here] = text, slot + 1
        rows = row[:present].max(initial=-1) + 1
        return cls(
            ids,
            segment_ids,
            first,
            np.asarray(rows, np.int32),
            row,
            segment,
            _filled(start, count),
            np.asarray(present, np.int32),
            _filled(task_ids, count) if task_ids.ndim else task_ids,
        )

    def tasks(self, source: Array) -> Array | np.ndarray:
        """The tasks of some sources: int, a scalar or [n]."""
        return self.task_ids if self.task_ids.ndim == 0 else self.task_ids[source]

    def row_tasks(self) -> Array | np.ndarray:
        """The tasks of the rows: int, a scalar or [R]."""
        if self.task_ids.ndim == 0:
            return self.task_ids
        tasks = jnp.zeros(len(self.input_ids), self.task_ids.dtype)
        return tasks.at[self.row].set(self.task_ids, mode="drop")


def _filled(x: np.ndarray, count: int) -> np.ndarray:
    """[n] -> [count], with zeros behind."""
    return np.concatenate([x, np.zeros(count - len(x), x.dtype)])
