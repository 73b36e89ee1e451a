"""Where the examples of a batch go: several to a row, in arrays of few static shapes.

Most sentences are short: padded to the maximal length, only 28% of the positions of a batch of
GLUE are real. Examples that share a row do not see each other (`pals_jax.models.segments`), so that
a packed step computes what the padded one does, in less than a third of the positions.

Every shape is one compilation. They are chosen from the data, before the run.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

_PARTS = 4  # lengths of rows are multiples of this part of the maximal length
_MOST_SHAPES = 8
_WORTH = 0.01  # the share of all work that a further shape must save
_COMPILATION = 20  # steps that must be saved by it at least, for which it is compiled
_LEAST = 8  # positions that every example is given at least, which bounds the examples of a row
_TOGETHER = 4096  # examples in any order that are packed at a time: more would fill rows no better

Sizes = tuple[np.ndarray, np.ndarray]  # of a batch of n examples: int [n] tasks, int [n] lengths


class Shape(NamedTuple):
    """Rows of all devices, and their length."""

    rows: int
    length: int


class Placement(NamedTuple):
    """Where the n examples of a batch go.

    Attributes:
        shape: of the batch.
        slots: M, the examples that a row has room for.
        row: int64 [n].
        slot: int64 [n], from 0, within the row.
        start: int64 [n]; the position of the first token.
    """

    shape: Shape
    slots: int
    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray


@dataclasses.dataclass(frozen=True)
class Padded:
    """One example a row, in order, at the next of four lengths: the reference.

    Attributes:
        batch_size: examples of a batch, or more than there are.
        max_length: the largest number of tokens of an example.
        shards: S, which divide the rows equally.
    """

    batch_size: int
    max_length: int
    shards: int = 1

    def __str__(self) -> str:
        return f"padded to one of {_PARTS} lengths of at most {self.max_length}"

    def batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Placement]]:
        """As `Packed.batches`; short ones first, so that they can be padded to a short row."""
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), self.batch_size):
            examples = order[start : start + self.batch_size]
            (placement,) = self.place((np.zeros_like(examples), lengths[examples]))
            yield examples, placement

    def place(self, *batches: Sizes) -> list[Placement]:
        """As `Packed.place`."""
        step, longest = -(-self.max_length // _PARTS), max(int(n.max()) for _, n in batches)
        shape = Shape(_up(self.batch_size, self.shards), min(_up(longest, step), self.max_length))
        rows = (np.arange(len(lengths)) for _, lengths in batches)
        return [Placement(shape, 1, row, np.zeros_like(row), np.zeros_like(row)) for row in rows]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of one task's examples each, as full as may be, in the cheapest shape that holds them.

    Attributes:
        shapes: cheapest first; the last one holds any batch.
        least: positions that an example is given at least.
    """

    shapes: tuple[Shape, ...]
    least: int

    @classmethod
    def into(cls, rows: int, max_length: int, shards: int = 1, prompts: int = 0) -> "Packed":
        """Into this one shape; arguments as for `choose`."""
        return cls((Shape(_up(rows, shards), max_length),), _least(max_length, prompts))

    @classmethod
    def choose(
        cls,
        samples: Iterable[Sizes],
        steps: int,
        batch_size: int,
        max_length: int,
        hidden_size: int,
        shards: int = 1,
        prompts: int = 0,
    ) -> "Packed":
        """The shapes that make the least work of a run.

        Args:
            samples: batches of the run.
            steps: of the run.
            batch_size: examples of a batch.
            max_length: the largest number of tokens of an example.
            hidden_size: D of the encoder, by which attention weighs against all else.
            shards: S, which divide the rows equally.
            prompts: positions that the model adds to each example.
        """
        least = _least(max_length, prompts)
        step = -(-max_length // _PARTS)
        rest = Shape(_up(batch_size, shards), step * _PARTS)  # holds any batch
        fits: dict[Shape, np.ndarray] = {}  # which of the samples a shape holds
        samples = list(samples)
        for length in range(step, 2 * step * _PARTS + 1, step):
            if length < least:  # there would be room for no example
                continue
            need = np.array([_rows_needed(*sample, length, least) for sample in samples])
            for rows in {_up(int(n), shards) for n in need if n}:
                fits[Shape(rows, length)] = (need > 0) & (need <= rows)

        def cost(shape: Shape) -> float:
            positions = shape.length + prompts * (shape.length // least)
            return shape.rows * positions * (1 + positions / (3 * hidden_size))

        chosen, each = [rest], np.full(len(samples), cost(rest))
        while len(chosen) < _MOST_SHAPES:
            saved = {s: (np.maximum(each - cost(s), 0) * fits[s]).sum() for s in sorted(fits)}
            best = max(saved, key=lambda shape: float(saved[shape]))
            if saved[best] < max(_WORTH, _COMPILATION / steps) * each.sum():
                break
            chosen.append(best)
            each = np.where(fits[best], np.minimum(each, cost(best)), each)
        return cls(tuple(sorted(chosen, key=cost)), least)

    def __str__(self) -> str:
        shapes = ", ".join(f"{shape.rows} x {shape.length}" for shape in self.shapes)
        return f"packed into these shapes (rows x positions), compiled as they occur: {shapes}"

    def place(self, *batches: Sizes) -> list[Placement]:
        """Places the examples of each batch; no row holds two tasks, and all have one shape."""
        for shape in self.shapes:
            tried = (self._placed(shape, *batch) for batch in batches)
            placements = [placement for placement in tried if placement is not None]
            if len(placements) == len(batches):
                return placements
        count = max(len(lengths) for _, lengths in batches)
        raise ValueError(f"{count} examples are more than a batch of {self.shapes[-1].rows}.")

    def batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Placement]]:
        """Divides examples of one task, in any order, into as few batches as may be.

        Args:
            lengths: int64 [n], of all.

        Yields:
            Which of them a batch holds, int64 [m], and where; together they hold each once.
        """
        shape = self.shapes[-1]
        row, start, rows = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64), 0
        for begin in range(0, len(lengths), _TOGETHER):
            some = slice(begin, begin + _TOGETHER)
            alike = np.zeros_like(lengths[some])
            of_some, start[some] = _best_fit(alike, lengths[some], shape.length, self.least)
            row[some], rows = rows + of_some, rows + of_some.max() + 1
        slot, slots, order = _ranks(row, start), shape.length // self.least, np.argsort(row)
        begins = np.searchsorted(row[order], np.arange(0, rows, shape.rows))
        for begin, end in itertools.pairwise([*begins, len(order)]):
            here = order[begin:end]
            yield here, Placement(shape, slots, row[here] % shape.rows, slot[here], start[here])

    def _placed(self, shape: Shape, tasks: np.ndarray, lengths: np.ndarray) -> Placement | None:
        """Where the examples go in this shape, if it holds them."""
        if _rows_at_least(lengths, shape.length, self.least) > shape.rows:
            return None
        row, start = _best_fit(tasks, lengths, shape.length, self.least)
        if row.max() >= shape.rows:
            return None
        return Placement(shape, shape.length // self.least, row, _ranks(row, start), start)


def _least(max_length: int, prompts: int) -> int:
    """Positions that an example is given at least; a row has room for one."""
    return min(max(_LEAST, prompts), max_length)


def _best_fit(
    tasks: np.ndarray, lengths: np.ndarray, room: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and starts, int64 [n] each: the longest first, each into the row that it fills most."""
    row, start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    needs, rows = np.maximum(lengths, least), 0
    for task in np.unique(tasks):
        free: list[tuple[int, int]] = []  # what is left of the task's rows, in order
        mine = np.flatnonzero(tasks == task)
        for i in mine[np.argsort(-needs[mine], kind="stable")].tolist():
            need = int(needs[i])
            at = bisect.bisect_left(free, (need, 0))
            if at < len(free):
                left, row[i] = free.pop(at)
            else:
                left, row[i], rows = room, rows, rows + 1
            start[i] = room - left
            bisect.insort(free, (left - need, int(row[i])))
    return row, start


def _rows_at_least(lengths: np.ndarray, room: int, least: int) -> float:
    """A bound from below on the rows of `room` positions that examples take."""
    return np.inf if lengths.max() > room else np.maximum(lengths, least).sum() / room


def _rows_needed(tasks: np.ndarray, lengths: np.ndarray, room: int, least: int) -> int:
    """How many rows of `room` positions a batch takes; 0 where an example does not fit."""
    if lengths.max() > room:
        return 0
    return int(_best_fit(tasks, lengths, room, least)[0].max()) + 1


def _ranks(row: np.ndarray, start: np.ndarray) -> np.ndarray:
    """int64 [n]: for each example how many of its row start before it."""
    order = np.lexsort((start, row))
    begins = np.searchsorted(row[order], row[order])
    ranks = np.empty(len(row), np.int64)
    ranks[order] = np.arange(len(row)) - begins
    return ranks


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
