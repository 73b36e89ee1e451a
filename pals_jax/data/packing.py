"""Places the examples of a batch: several in a row, in arrays of few static shapes.

Most sentences are short: in a GLUE batch padded to the maximal length, only 28% of the positions
hold tokens. Examples that share a row do not see each other (`pals_jax.models.segments`), so that a
packed step computes the same as a padded one, in less than a third of the positions.

Every shape costs one compilation. The shapes are chosen from the data, before the run.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

_PARTS = 4  # row lengths are multiples of the maximal length divided by this
_MOST_SHAPES = 8
_WORTH = 0.01  # the share of all work that another shape must save
_COMPILATION = 20  # the steps that another shape must save, to be worth its compilation
_LEAST = 8  # the least positions that an example takes, which bounds the examples in a row
_SHORTEST, _SOME = 16, 4  # the shortest row, and the rows of a middle shape, of `Packed.few`
_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384)  # the rows of `Packed.grid`
_SHARES = (1, 2, 4)  # the numbers of rows of `Packed.grid`: the largest by these, and one row
_TOGETHER = 4096  # examples that are packed at a time; more would not fill rows better

Sizes = tuple[np.ndarray, np.ndarray]  # int [n] tasks, int [n] lengths of a batch of n examples


class Shape(NamedTuple):
    """The number of rows on all devices together, and their length."""

    rows: int
    length: int


class Placement(NamedTuple):
    """The places of the n examples of a batch.

    Attributes:
        shape: the shape of the batch.
        slots: M, the number of examples that a row has room for.
        row: int64 [n]; the row of each example.
        slot: int64 [n]; the slot of each example in its row, from 0.
        start: int64 [n]; the position of each example's first token.
    """

    shape: Shape
    slots: int
    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray


@dataclasses.dataclass(frozen=True)
class Padded:
    """One example per row, in order, padded to the next of four lengths: the reference.

    Attributes:
        batch_size: the largest number of examples in a batch.
        max_length: the largest number of tokens of an example.
        shards: S, the number of shards that divide the rows equally.
    """

    batch_size: int
    max_length: int
    shards: int = 1

    def __str__(self) -> str:
        return f"padded to one of {_PARTS} lengths of at most {self.max_length}"

    def batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Placement]]:
        """As `Packed.batches`; sorted by length, so that short examples get short rows."""
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
    """Rows with examples of one task each, in the cheapest shape that holds the batch.

    Attributes:
        shapes: the shapes, cheapest first; the last one holds any batch.
        least: the least positions that an example takes.
    """

    shapes: tuple[Shape, ...]
    least: int

    @classmethod
    def into(cls, rows: int, max_length: int, shards: int = 1, prompts: int = 0) -> "Packed":
        """Packs into this one shape; arguments as for `choose`."""
        return cls((Shape(_up(rows, shards), max_length),), _least(max_length, prompts))

    @classmethod
    def few(cls, rows: int, max_length: int, shards: int = 1, prompts: int = 0) -> "Packed":
        """For any number of examples: one row of a few lengths, some rows, or `rows` rows.

        One short text thus costs one short row. Arguments as for `choose`.
        """
        least, length = _least(max_length, prompts), _SHORTEST
        shapes = {Shape(_up(min(some, rows), shards), max_length) for some in (1, _SOME, rows)}
        while length < max_length:
            if length >= least:
                shapes.add(Shape(_up(1, shards), length))
            length *= 2
        return cls(tuple(sorted(shapes, key=math.prod)), least)

    @classmethod
    def grid(cls, rows: int, max_length: int, shards: int = 1, prompts: int = 0) -> "Packed":
        """For what waits in a queue: each of a few lengths with each of a few numbers of rows.

        Arguments as for `choose`.
        """
        least = _least(max_length, prompts)
        lengths = {n for n in _LENGTHS if least <= n < max_length} | {max_length}
        counts = {_up(n, shards) for n in (1, *(-(-rows // share) for share in _SHARES))}
        shapes = itertools.starmap(Shape, itertools.product(counts, lengths))
        return cls(tuple(sorted(shapes, key=lambda shape: (math.prod(shape), shape))), least)

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
        """The shapes that minimise the work of a run.

        Args:
            samples: the sizes of sample batches of the run.
            steps: the number of steps of the run.
            batch_size: the number of examples in a batch.
            max_length: the largest number of tokens of an example.
            hidden_size: D of the encoder, which sets the cost of attention relative to the rest.
            shards: S, the number of shards that divide the rows equally.
            prompts: the number of positions that the model adds to each example.
        """
        least = _least(max_length, prompts)
        step = -(-max_length // _PARTS)
        rest = Shape(_up(batch_size, shards), step * _PARTS)  # holds any batch
        fits: dict[Shape, np.ndarray] = {}  # for each shape, which samples it holds
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
        """Divides the examples of one task, in any order, into as few batches as possible.

        All have the last shape, except that the last batch has the cheapest that holds it.

        Args:
            lengths: int64 [n], the lengths of all examples.

        Yields:
            The indices of a batch's examples, int64 [m], and their placement. Each example is in
            one batch.
        """
        shape = self.shapes[-1]
        row, start, rows = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64), 0
        for begin in range(0, len(lengths), _TOGETHER):
            some = slice(begin, begin + _TOGETHER)
            alike = np.zeros_like(lengths[some])
            of_some, start[some] = _best_fit(alike, lengths[some], shape.length, self.least)
            row[some], rows = rows + of_some, rows + of_some.max() + 1
        slot, slots, order = ranks(row, start), shape.length // self.least, np.argsort(row)
        begins = np.searchsorted(row[order], np.arange(0, rows, shape.rows))
        for begin, end in itertools.pairwise([*begins, len(order)]):
            here = order[begin:end]
            smaller = self._in_smaller(lengths[here]) if end == len(order) else None
            whole = Placement(shape, slots, row[here] % shape.rows, slot[here], start[here])
            yield here, smaller or whole

    def _in_smaller(self, lengths: np.ndarray) -> Placement | None:
        """The placement of one task's examples in the cheapest shape but the last, or None."""
        alike = np.zeros_like(lengths)
        tried = (self._placed(shape, alike, lengths) for shape in self.shapes[:-1])
        return next((placement for placement in tried if placement is not None), None)

    def _placed(self, shape: Shape, tasks: np.ndarray, lengths: np.ndarray) -> Placement | None:
        """The placement of the examples in this shape; None if it does not hold them."""
        if _rows_at_least(lengths, shape.length, self.least) > shape.rows:
            return None
        row, start = _best_fit(tasks, lengths, shape.length, self.least)
        if row.max() >= shape.rows:
            return None
        return Placement(shape, shape.length // self.least, row, ranks(row, start), start)


def _least(max_length: int, prompts: int) -> int:
    """The least positions that an example takes; a row has room for at least one example."""
    return min(max(_LEAST, prompts), max_length)


def _best_fit(
    tasks: np.ndarray, lengths: np.ndarray, room: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and starts, int64 [n] each, by best fit: longest first, into the fullest that fits."""
    row, start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    needs, rows = np.maximum(lengths, least), 0
    for task in np.unique(tasks):
        free: list[tuple[int, int]] = []  # free positions and number of the task's rows, sorted
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
    """A lower bound on the rows of `room` positions that the examples need."""
    return np.inf if lengths.max() > room else np.maximum(lengths, least).sum() / room


def _rows_needed(tasks: np.ndarray, lengths: np.ndarray, room: int, least: int) -> int:
    """The number of rows of `room` positions that a batch needs; 0 if an example does not fit."""
    if lengths.max() > room:
        return 0
    return int(_best_fit(tasks, lengths, room, least)[0].max()) + 1


def ranks(row: np.ndarray, start: np.ndarray) -> np.ndarray:
    """int64 [n]: for each example, the number of examples that start before it in its row."""
    order = np.lexsort((start, row))
    begins = np.searchsorted(row[order], row[order])
    ranks = np.empty(len(row), np.int64)
    ranks[order] = np.arange(len(row)) - begins
    return ranks


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
