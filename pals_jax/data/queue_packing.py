"""Chooses the next batch among the examples of any tasks that wait in a queue, and places them."""

import dataclasses

import numpy as np

from pals_jax.data.packing import Packed, Placement, Shape, ranks


@dataclasses.dataclass(frozen=True)
class QueuePacking:
    """Takes the batch that is computed fastest for its tokens, of those with the oldest example.

    Attributes:
        packed: the shapes, each of a few lengths with each of a few numbers of rows.
        seconds: of a batch of each shape.
    """

    packed: Packed
    seconds: dict[Shape, float]

    def next_batch(self, tasks: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, Placement]:
        """The indices of the examples to compute now, int64 [m], and their places.

        The rows are as short as the oldest example allows. They are filled with examples of such
        rows, oldest first, and the room that is left with shorter ones. More rows are taken if that
        computes more tokens per second.

        Args:
            tasks: int [n], of all examples, the oldest first.
            lengths: int [n], their numbers of tokens.
        """
        shapes = self.packed.shapes
        steps = np.unique([shape.length for shape in shapes])
        bucket = np.searchsorted(steps, lengths)
        fitting = np.flatnonzero(bucket <= bucket[0])
        order = fitting[np.argsort(-bucket[fitting], kind="stable")]
        candidates = [shape for shape in shapes if shape.length == steps[bucket[0]]]
        largest = max(candidates)
        row, start = _first_fit(tasks[order], lengths[order], largest, self.packed.least)

        def rate(shape: Shape) -> float:
            return float(lengths[order[row < shape.rows]].sum() / self.seconds[shape])

        shape = max(candidates, key=rate)
        here = row < shape.rows
        row, start = row[here], start[here]
        slots = shape.length // self.packed.least
        return order[here], Placement(shape, slots, row, ranks(row, start), start)


def _first_fit(
    tasks: np.ndarray, lengths: np.ndarray, shape: Shape, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and starts, int64 [n] each, in the given order; without room, the row is `shape.rows`.

    No row holds two tasks. With fewer rows, the examples of the rows that are left are the same.
    """
    row, start = np.full(len(lengths), shape.rows), np.zeros(len(lengths), np.int64)
    needs, rows = np.maximum(lengths, least), 0
    free: dict[int, list[list[int]]] = {}  # by task: its rows with their free positions
    for i, (task, need) in enumerate(zip(tasks.tolist(), needs.tolist(), strict=True)):
        here = next((x for x in free.setdefault(task, []) if x[1] >= need), None)
        if here is None and rows < shape.rows:
            here, rows = [rows, shape.length], rows + 1
            free[task].append(here)
        if here is not None:
            row[i], start[i] = here[0], shape.length - here[1]
            here[1] -= need
    return row, start
