"""Builds batches: examples in arrays of few static shapes, divided among the devices."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from pals_jax.data.batch import Batch, TargetTexts
from pals_jax.data.packing import Packed, Padded, Placement, Sizes
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.runtime.shards import Shards


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tokens that a model expects.

    Attributes:
        pad_id: the id of the padding token.
        token_types: the number of token types; if it is 1, every token has type 0. 0: the model has
            none.
    """

    pad_id: int = 0
    token_types: int = 2


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Makes this host's part of the batch of a draw.

    Attributes:
        splits: the training examples of each trained task.
        layout: the tokens that the model expects.
        placing: how examples are placed in rows.
        shards: how the rows are divided among devices.
        first_task: the index of the first trained task on the model's task axis.
        num_tasks: T, the length of that axis.
    """

    splits: Sequence[TokenizedSplit]
    layout: Layout
    placing: Padded | Packed
    shards: Shards
    first_task: int
    num_tasks: int

    def __call__(self, *draws: Draw) -> Batch:
        """This host's part of the batch; every array has a leading axis [s] of its shards.

        task_ids are int32 [s, 1] if the batch has one task, and [s, r] if each row has its own.
        For several draws, each array has an axis of draws after the leading one.
        """
        placements = zip(draws, self.place(*draws), strict=True)
        batches = [self._batch(draw, placement) for draw, placement in placements]
        if len(batches) == 1:
            return batches[0]
        return jax.tree.map(lambda *x: np.stack(x, axis=1), *batches)

    def place(self, *draws: Draw) -> list[Placement]:
        """The placement of each draw's examples; all placements have one shape."""
        return self.placing.place(*(sizes(self.splits, draw) for draw in draws))

    def _batch(self, draw: Draw, placement: Placement) -> Batch:
        tasks, _ = sizes(self.splits, draw)
        items = [
            (self.splits[task], i)
            for task, i in zip(tasks.tolist(), draw.examples.reshape(-1).tolist(), strict=True)
        ]
        if len(draw.trained_ids) == 1:
            of_rows = np.repeat(draw.trained_ids, self.shards.local)
        else:
            of_rows = _of_rows(tasks, placement, self.shards)
        task_ids = self.shards.split(of_rows.astype(np.int32) + self.first_task)
        batch = _batch(items, placement, task_ids, self.layout, self.shards)
        if len(draw.trained_ids) >= self.num_tasks:
            return batch
        return batch.replace(slot_tasks=np.tile(self._slot_tasks(draw), (self.shards.local, 1)))

    def _slot_tasks(self, draw: Draw) -> np.ndarray:
        """int32 [U]: the drawn tasks, filled up with others if they are fewer than the groups."""
        every = np.arange(self.num_tasks, dtype=np.int32)
        is_drawn = np.isin(every, draw.trained_ids + self.first_task)
        return np.concatenate([every[is_drawn], every[~is_drawn]])[: len(draw.trained_ids)]


def sizes(splits: Sequence[TokenizedSplit], draw: Draw) -> Sizes:
    """The tasks, int32 [G * b], and the `TokenizedSplit.sizes` of the examples of a draw."""
    groups = zip(draw.trained_ids.tolist(), draw.examples, strict=True)
    drawn = [_sizes_of(splits[task], i) for task, i in groups]
    return np.repeat(draw.trained_ids, draw.examples.shape[1]), np.concatenate(drawn)


def _sizes_of(split: TokenizedSplit, i: np.ndarray) -> np.ndarray:
    """`split.sizes[i]`, without going through all of a split that is on disk."""
    lengths = split.offsets[i + 1] - split.offsets[i]
    if (texts := split.target_texts) is None:
        return lengths
    return np.stack([lengths, texts.offsets[i + 1] - texts.offsets[i] - 1], axis=1)


def eval_batches(
    split: TokenizedSplit, task_id: int, layout: Layout, placing: Padded | Packed, shards: Shards
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example of a split once, in unspecified order.

    Yields:
        This host's part of a batch, for `inference.steps.make_eval_step`, and the index of the
        example in every slot of the rows of all shards, int64 [S * r, M]; -1 in empty slots.
    """
    for indices, placement in placing.batches(split.sizes):
        task_ids = np.full((shards.local, 1), task_id, np.int32)
        items = [(split, i) for i in indices.tolist()]
        batch = _batch(items, placement, task_ids, layout, shards)
        examples = np.full((placement.shape.rows, placement.slots), -1)
        examples[placement.row, placement.slot] = indices
        yield batch, examples


def mixed_batch(
    items: Sequence[tuple[TokenizedSplit, int]],
    tasks: np.ndarray,
    placement: Placement,
    layout: Layout,
    shards: Shards,
) -> Batch:
    """This host's part of a batch of the examples (split, index) of any tasks, int [n]."""
    task_ids = shards.split(_of_rows(tasks, placement, shards).astype(np.int32))
    return _batch(items, placement, task_ids, layout, shards)


def _of_rows(tasks: np.ndarray, placement: Placement, shards: Shards) -> np.ndarray:
    """The tasks of this host's rows, given those of the examples; a row without any has another."""
    of_rows = np.full(placement.shape.rows, tasks[0])
    of_rows[placement.row] = tasks
    return of_rows[shards.mine(placement.shape.rows)]


def _batch(
    items: Sequence[tuple[TokenizedSplit, int]],
    placement: Placement,
    task_ids: Any,
    layout: Layout,
    shards: Shards,
) -> Batch:
    """This host's rows of a batch of the examples (split, index)."""
    rows, slots = placement.shape.rows, placement.slots

    def here(x: np.ndarray) -> np.ndarray:
        return shards.split(x[shards.mine(rows)])

    def of_examples(values: Any, dtype: Any, fill: int = 0) -> Any:
        x = np.full((rows, slots), fill, dtype)
        x[placement.row, placement.slot] = values
        return here(x)

    tokens = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for split, i in items]
    places = _Places.of(placement, placement.start, placement.shape.length, tokens)
    types = None
    if layout.token_types:
        first = np.array([split.first[i] for split, i in items])
        later = places.within >= np.repeat(first, places.lengths)
        types = here(places.fill(later & (layout.token_types > 1)))
    target_texts, targets = None, None
    if placement.target_start is None:
        targets = of_examples([split.targets[i] for split, i in items], np.float32)
    else:
        target_texts = _target_texts(items, placement, layout, here)
    return Batch(
        input_ids=here(places.fill(np.concatenate(tokens), layout.pad_id)),
        token_type_ids=types,
        attention_mask=here(places.fill(np.repeat(placement.slot + 1, places.lengths))),
        first=of_examples(placement.start, np.int32),
        example_ids=of_examples(np.arange(len(items)), np.int32, -1),
        targets=targets,
        weights=of_examples(1.0, np.float32),
        task_ids=task_ids,
        hidden=_hidden(items, places, here),
        target_texts=target_texts,
    )


class _Places(NamedTuple):
    """The places of all tokens of some texts in the rows of a batch.

    Attributes:
        shape: the number of rows, and their length.
        lengths: int [n]; of the texts.
        within: int [sum of lengths]; each token's position in its text.
        at: the same; its index in the rows, end to end.
    """

    shape: tuple[int, int]
    lengths: np.ndarray
    within: np.ndarray
    at: np.ndarray

    @classmethod
    def of(
        cls, placement: Placement, start: np.ndarray, length: int, tokens: Sequence[np.ndarray]
    ) -> Self:
        """Those of texts that begin at `start`, int [n], in rows of some length."""
        lengths = np.array([len(t) for t in tokens])
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(placement.row * length + start, lengths) + within
        return cls((placement.shape.rows, length), lengths, within, at)

    def fill(self, values: np.ndarray, empty: int = 0) -> np.ndarray:
        """int32 rows with a value for each token, and `empty` elsewhere."""
        x = np.full(self.shape, empty, np.int32)
        np.put(x, self.at, values)
        return x


def _target_texts(
    items: Sequence[tuple[TokenizedSplit, int]],
    placement: Placement,
    layout: Layout,
    here: Callable[[np.ndarray], np.ndarray],
) -> TargetTexts:
    """This host's rows of the targets of a batch."""
    found = [(split.target_texts, i) for split, i in items]
    texts = [x.tokens[x.offsets[i] : x.offsets[i + 1]] for x, i in found if x is not None]
    assert placement.target_start is not None
    read, said = [text[:-1] for text in texts], [text[1:] for text in texts]
    length = placement.shape.room[1]
    places = _Places.of(placement, placement.target_start, length, said)
    first = np.zeros((placement.shape.rows, placement.slots), np.int32)
    first[placement.row, placement.slot] = placement.target_start
    return TargetTexts(
        input_ids=here(places.fill(np.concatenate(read), layout.pad_id)),
        labels=here(places.fill(np.concatenate(said), layout.pad_id)),
        attention_mask=here(places.fill(np.repeat(placement.slot + 1, places.lengths))),
        first=here(first),
    )


def _hidden(
    items: Sequence[tuple[TokenizedSplit, int]],
    places: _Places,
    here: Callable[[np.ndarray], np.ndarray],
) -> Any:
    """The cached hidden states of all tokens, at their places; None without a cache."""
    cached = [
        split.hidden[split.offsets[i] : split.offsets[i + 1]]
        for split, i in items
        if split.hidden is not None
    ]
    if not cached:
        return None
    hidden = np.zeros((math.prod(places.shape), cached[0].shape[1]), cached[0].dtype)
    hidden[places.at] = np.concatenate(cached)
    return here(hidden.reshape(*places.shape, -1))
