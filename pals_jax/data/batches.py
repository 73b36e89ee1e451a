"""Builds batches: examples in arrays of few static shapes, divided among the devices."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pals_jax.data.batch import Batch
from pals_jax.data.packing import Packed, Padded, Placement, Sizes
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenize import TokenizedSplit
from pals_jax.runtime.shards import Shards


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tokens that an encoder expects.

    Attributes:
        pad_id: the id of the padding token.
        token_types: the number of token types; if it is 1, every token has type 0.
    """

    pad_id: int = 0
    token_types: int = 2


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Makes this host's part of the batch of a draw.

    Attributes:
        splits: the training examples of each trained task.
        layout: the tokens that the encoder expects.
        placing: how examples are placed in rows.
        shards: how the rows are divided among devices.
        first_task: the index of the first trained task on the model's task axis.
        num_tasks: T, the length of that axis.
        all_may_move: whether the optimiser also changes tasks that are not drawn.
    """

    splits: Sequence[TokenizedSplit]
    layout: Layout
    placing: Padded | Packed
    shards: Shards
    first_task: int
    num_tasks: int
    all_may_move: bool = False

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
        if self.all_may_move or len(draw.trained_ids) >= self.num_tasks:
            return batch
        return batch.replace(slot_tasks=np.tile(self._may_move(draw), (self.shards.local, 1)))

    def _may_move(self, draw: Draw) -> np.ndarray:
        """int32 [U]: the drawn tasks, filled up with others if they are fewer than the groups."""
        every = np.arange(self.num_tasks, dtype=np.int32)
        is_drawn = np.isin(every, draw.trained_ids + self.first_task)
        return np.concatenate([every[is_drawn], every[~is_drawn]])[: len(draw.trained_ids)]


def sizes(splits: Sequence[TokenizedSplit], draw: Draw) -> Sizes:
    """The tasks, int32, and the lengths, int64, of the examples of a draw, [G * b] each."""
    groups = zip(draw.trained_ids.tolist(), draw.examples, strict=True)
    lengths = [splits[task].offsets[i + 1] - splits[task].offsets[i] for task, i in groups]
    return np.repeat(draw.trained_ids, draw.examples.shape[1]), np.concatenate(lengths)


def eval_batches(
    split: TokenizedSplit, task_id: int, layout: Layout, placing: Padded | Packed, shards: Shards
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example of a split once, in unspecified order.

    Yields:
        This host's part of a batch, for `inference.steps.make_eval_step`, and the index of the
        example in every slot of the rows of all shards, int64 [S * r, M]; -1 in empty slots.
    """
    for indices, placement in placing.batches(split.lengths):
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
    (rows, length), slots = placement.shape, placement.slots
    tokens = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for split, i in items]
    lengths = np.array([len(t) for t in tokens])
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(placement.row * length + placement.start, lengths) + within
    first = np.array([split.first[i] for split, i in items])
    types = (within >= np.repeat(first, lengths)) & (layout.token_types > 1)

    def here(x: np.ndarray) -> np.ndarray:
        return shards.split(x[shards.mine(rows)])

    def of_tokens(values: np.ndarray, fill: int = 0) -> Any:
        x = np.full((rows, length), fill, np.int32)
        np.put(x, at, values)
        return here(x)

    def of_examples(values: Any, dtype: Any, fill: int = 0) -> Any:
        x = np.full((rows, slots), fill, dtype)
        x[placement.row, placement.slot] = values
        return here(x)

    return Batch(
        input_ids=of_tokens(np.concatenate(tokens), layout.pad_id),
        token_type_ids=of_tokens(types),
        attention_mask=of_tokens(np.repeat(placement.slot + 1, lengths)),
        first=of_examples(placement.start, np.int32),
        example_ids=of_examples(np.arange(len(items)), np.int32, -1),
        targets=of_examples([split.targets[i] for split, i in items], np.float32),
        weights=of_examples(1.0, np.float32),
        task_ids=task_ids,
        hidden=_hidden(items, at, placement.shape, here),
    )


def _hidden(
    items: Sequence[tuple[TokenizedSplit, int]],
    at: np.ndarray,
    shape: tuple[int, int],
    here: Callable[[np.ndarray], np.ndarray],
) -> Any:
    """The cached hidden states of all tokens, at their positions `at`; None without a cache."""
    cached = [
        split.hidden[split.offsets[i] : split.offsets[i + 1]]
        for split, i in items
        if split.hidden is not None
    ]
    if not cached:
        return None
    hidden = np.zeros((math.prod(shape), cached[0].shape[1]), cached[0].dtype)
    hidden[at] = np.concatenate(cached)
    return here(hidden.reshape(*shape, -1))
