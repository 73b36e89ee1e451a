"""Places the examples of a batch: several in a row, in arrays of few static shapes.

Most sentences are short: in a GLUE batch padded to the maximal length, only 28% of the positions
hold tokens. Examples that share a row do not see each other (`pals_jax.models.segments`), so that a
packed step computes the same as a padded one, in less than a third of the positions.

The source and the target of a pair lie in the same row, of sources and of targets.

Every shape costs one compilation. The shapes are chosen from the data, before the run.
"""

import bisect
import dataclasses
import itertools
import operator
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

# int [n] tasks, and int [n] lengths of a batch of n examples; of pairs [n, 2], source and target.
Sizes = tuple[np.ndarray, np.ndarray]
Lengths = int | tuple[int, ...]  # of a text, or of source and target


class Shape(tuple[int, ...]):
    """The number of rows on all devices together, and their length; of pairs that of targets too.

    `Shape(8, 128)` is of 8 rows of 128 positions, `Shape(8, 128, 64)` of 8 rows of sources and
    their rows of targets.
    """

    def __new__(cls, rows: int, *room: int) -> "Shape":
        """The number of rows, and the positions in a row, or in one of sources and of targets."""
        return super().__new__(cls, (rows, *room))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self[0]

    @property
    def length(self) -> int:
        """The positions in a row; of pairs, in one of sources."""
        return self[1]

    @property
    def room(self) -> tuple[int, ...]:
        """The positions in a row, or in one of sources and one of targets."""
        return self[1:]

    @property
    def positions(self) -> int:
        """All positions."""
        return self.rows * sum(self.room)


class Placement(NamedTuple):
    """The places of the n examples of a batch.

    Attributes:
        shape: the shape of the batch.
        slots: M, the number of examples that a row has room for.
        row: int64 [n]; the row of each example.
        slot: int64 [n]; the slot of each example in its row, from 0.
        start: int64 [n]; the position of each example's first token.
        target_start: int64 [n]; that of the first token of its target. None: there are no pairs.
    """

    shape: Shape
    slots: int
    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray
    target_start: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Padded:
    """One example per row, in order, padded to the next of four lengths: the reference.

    Attributes:
        batch_size: the largest number of examples in a batch.
        max_length: the largest number of tokens of an example; of pairs, of source and target.
        shards: S, the number of shards that divide the rows equally.
    """

    batch_size: int
    max_length: Lengths
    shards: int = 1

    def __str__(self) -> str:
        most = " and ".join(map(str, _room(self.max_length)))
        return f"padded to one of {_PARTS} lengths of at most {most}"

    def batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Placement]]:
        """As `Packed.batches`; sorted by length, so that short examples get short rows."""
        order = np.argsort(_by_text(lengths)[:, 0], kind="stable")
        for start in range(0, len(order), self.batch_size):
            examples = order[start : start + self.batch_size]
            (placement,) = self.place((np.zeros_like(examples), lengths[examples]))
            yield examples, placement

    def place(self, *batches: Sizes) -> list[Placement]:
        """As `Packed.place`."""
        most = _room(self.max_length)
        longest = np.max([_by_text(lengths).max(axis=0) for _, lengths in batches], axis=0).tolist()
        room = (min(_up(n, -(-m // _PARTS)), m) for n, m in zip(longest, most, strict=True))
        shape = Shape(_up(self.batch_size, self.shards), *room)
        rows = (np.arange(len(lengths)) for _, lengths in batches)
        return [
            _placement(shape, 1, row, np.zeros_like(row), np.zeros((len(row), len(most)), np.int64))
            for row in rows
        ]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows with examples of one task each, in the cheapest shape that holds the batch.

    Attributes:
        shapes: the shapes, cheapest first; the last one holds any batch.
        least: the least positions that an example, or its source, takes.
    """

    shapes: tuple[Shape, ...]
    least: int

    @classmethod
    def into(cls, rows: int, max_length: Lengths, shards: int = 1, prompts: int = 0) -> "Packed":
        """Packs into this one shape; arguments as for `choose`."""
        room = _room(max_length)
        return cls((Shape(_up(rows, shards), *room),), _least(room[0], prompts))

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
        return cls(tuple(sorted(shapes, key=lambda shape: shape.positions)), least)

    @classmethod
    def grid(cls, rows: int, max_length: int, shards: int = 1, prompts: int = 0) -> "Packed":
        """For what waits in a queue: each of a few lengths with each of a few numbers of rows.

        Arguments as for `choose`.
        """
        least = _least(max_length, prompts)
        lengths = {n for n in _LENGTHS if least <= n < max_length} | {max_length}
        counts = {_up(n, shards) for n in (1, *(-(-rows // share) for share in _SHARES))}
        shapes = itertools.starmap(Shape, itertools.product(counts, lengths))
        return cls(tuple(sorted(shapes, key=lambda shape: (shape.positions, shape))), least)

    @classmethod
    def choose(
        cls,
        samples: Iterable[Sizes],
        steps: int,
        batch_size: int,
        max_length: Lengths,
        hidden_size: int,
        shards: int = 1,
        prompts: int = 0,
        target_cost: float = 1.0,
    ) -> "Packed":
        """The shapes that minimise the work of a run.

        Args:
            samples: the sizes of sample batches of the run.
            steps: the number of steps of the run.
            batch_size: the number of examples in a batch.
            max_length: the largest number of tokens of an example; of pairs, of source and target.
            hidden_size: D of the encoder, which sets the cost of attention relative to the rest.
            shards: S, the number of shards that divide the rows equally.
            prompts: the number of positions that the model adds to each example, or its source.
            target_cost: of pairs, the cost of a position of a target relative to one of a source.
        """
        most = _room(max_length)
        least, step = _least(most[0], prompts), [-(-length // _PARTS) for length in most]
        rest = Shape(_up(batch_size, shards), *(part * _PARTS for part in step))  # holds any batch
        fits: dict[Shape, np.ndarray] = {}  # for each shape, which samples it holds
        samples = list(samples)
        lengths = (range(part, 2 * part * _PARTS + 1, part) for part in step)
        for room in itertools.product(*lengths):
            if room[0] < least:  # there would be room for no example
                continue
            need = np.array([_rows_needed(*sample, room, least) for sample in samples])
            for rows in {_up(int(n), shards) for n in need if n}:
                fits[Shape(rows, *room)] = (need > 0) & (need <= rows)

        def cost(shape: Shape) -> float:
            source, *targets = shape.room
            source += prompts * (source // least)
            weights = (1.0, *[target_cost] * len(targets))
            return shape.rows * sum(
                weight * positions * (1 + positions / (3 * hidden_size))
                for weight, positions in zip(weights, (source, *targets), strict=True)
            )

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
        shapes = ", ".join(f"{s.rows} x {' and '.join(map(str, s.room))}" for s in self.shapes)
        return f"packed into these shapes (rows x positions), compiled as they occur: {shapes}"

    def holds(self, *batches: Sizes) -> bool:
        """Whether the last shape holds each of the batches."""
        return all(self._placed(self.shapes[-1], *batch) is not None for batch in batches)

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
            lengths: int64 [n] or, of pairs, [n, 2]; the lengths of all examples.

        Yields:
            The indices of a batch's examples, int64 [m], and their placement. Each example is in
            one batch.
        """
        shape = self.shapes[-1]
        row, rows = np.empty(len(lengths), np.int64), 0
        starts = np.empty((len(lengths), len(shape.room)), np.int64)
        for begin in range(0, len(lengths), _TOGETHER):
            some = slice(begin, begin + _TOGETHER)
            alike = np.zeros_like(row[some])
            of_some, starts[some] = _best_fit(alike, lengths[some], shape.room, self.least)
            row[some], rows = rows + of_some, rows + of_some.max() + 1
        slot, slots, order = ranks(row, starts[:, 0]), shape.length // self.least, np.argsort(row)
        begins = np.searchsorted(row[order], np.arange(0, rows, shape.rows))
        for begin, end in itertools.pairwise([*begins, len(order)]):
            here = order[begin:end]
            smaller = self._in_smaller(lengths[here]) if end == len(order) else None
            whole = _placement(shape, slots, row[here] % shape.rows, slot[here], starts[here])
            yield here, smaller or whole

    def _in_smaller(self, lengths: np.ndarray) -> Placement | None:
        """The placement of one task's examples in the cheapest shape but the last, or None."""
        alike = np.zeros(len(lengths), np.int64)
        tried = (self._placed(shape, alike, lengths) for shape in self.shapes[:-1])
        return next((placement for placement in tried if placement is not None), None)

    def _placed(self, shape: Shape, tasks: np.ndarray, lengths: np.ndarray) -> Placement | None:
        """The placement of the examples in this shape; None if it does not hold them."""
        if _rows_at_least(lengths, shape.room, self.least) > shape.rows:
            return None
        row, starts = _best_fit(tasks, lengths, shape.room, self.least)
        if row.max() >= shape.rows:
            return None
        slots = shape.length // self.least
        return _placement(shape, slots, row, ranks(row, starts[:, 0]), starts)


def _room(max_length: Lengths) -> tuple[int, ...]:
    """The positions of a row that holds any example: of a text, or of source and target."""
    return (max_length,) if isinstance(max_length, int) else tuple(max_length)


def _by_text(lengths: np.ndarray) -> np.ndarray:
    """[n] or [n, 2] -> [n, 1 or 2]: the lengths of the texts of each example."""
    return lengths.reshape(len(lengths), -1)


def _placement(
    shape: Shape, slots: int, row: np.ndarray, slot: np.ndarray, starts: np.ndarray
) -> Placement:
    """The placement of examples whose texts have these starts, int64 [n, 1 or 2]."""
    start, *of_targets = starts.T
    return Placement(shape, slots, row, slot, start, *of_targets)


def _least(max_length: int, prompts: int) -> int:
    """The least positions that an example takes; a row has room for at least one example."""
    return min(max(_LEAST, prompts), max_length)


def _needs(lengths: np.ndarray, least: int) -> np.ndarray:
    """int [n, 1 or 2]: the positions that each example takes."""
    needs = _by_text(lengths).copy()
    needs[:, 0] = np.maximum(needs[:, 0], least)
    return needs


def _best_fit(
    tasks: np.ndarray, lengths: np.ndarray, room: tuple[int, ...], least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows, int64 [n], and starts, [n, 1 or 2]: longest first, into the fullest row that fits.

    Of pairs, the longest for the room of its text, and the fullest of sources.
    """
    needs = _needs(lengths, least)
    longest_first = np.argsort(-(needs / room).max(axis=1), kind="stable")
    row, starts, rows = [0] * len(needs), [room] * len(needs), 0
    for task in np.unique(tasks):
        # Free positions and number of the task's rows, sorted by those of texts or sources.
        free: list[tuple[int, int, tuple[int, ...]]] = []
        for i in longest_first[tasks[longest_first] == task].tolist():
            need, *of_targets = needs[i].tolist()
            at = bisect.bisect_left(free, (need,))
            while at < len(free) and any(map(operator.gt, of_targets, free[at][2])):
                at += 1
            if at < len(free):
                left, row[i], targets_left = free.pop(at)
            else:
                left, row[i], targets_left, rows = room[0], rows, room[1:], rows + 1
            starts[i] = tuple(map(operator.sub, room, (left, *targets_left)))
            targets_left = tuple(map(operator.sub, targets_left, of_targets))
            bisect.insort(free, (left - need, row[i], targets_left))
    return np.array(row, np.int64), np.array(starts, np.int64)


def _rows_at_least(lengths: np.ndarray, room: tuple[int, ...], least: int) -> float:
    """A lower bound on the rows that the examples need."""
    if (_by_text(lengths) > room).any():
        return np.inf
    return float((_needs(lengths, least).sum(axis=0) / room).max())


def _rows_needed(tasks: np.ndarray, lengths: np.ndarray, room: tuple[int, ...], least: int) -> int:
    """The number of rows that a batch needs; 0 if an example does not fit."""
    if (_by_text(lengths) > room).any():
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
