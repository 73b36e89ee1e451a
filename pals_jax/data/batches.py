"""Examples into arrays of few static shapes, divided among the devices."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pals_jax.data.packing import Packed, Padded, Placement, Sizes
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenize import TokenizedSplit
from pals_jax.runtime.shards import Shards

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an encoder takes.

    Attributes:
        pad_id: the token that fills rows up.
        token_types: how many the encoder tells apart; where it is one, every token is of type 0.
    """

    pad_id: int = 0
    token_types: int = 2


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Makes this host's part of the batch of a draw.

    Attributes:
        splits: the training examples of each of the tasks that are trained.
        layout: what the encoder takes.
        placing: where examples go.
        shards: how the rows are divided.
        first_task: the place on the model's task axis of the first of these tasks.
        num_tasks: T, of that axis.
        all_may_move: whether the optimiser moves tasks that are not drawn.
    """

    splits: Sequence[TokenizedSplit]
    layout: Layout
    placing: Padded | Packed
    shards: Shards
    first_task: int
    num_tasks: int
    all_may_move: bool = False

    def __call__(self, *draws: Draw) -> Batch:
        """The batch, as `step.make_train_step` takes it, each array with a leading axis [s].

        task_ids are int32 [s, 1] where a batch has one task, and [s, r] where each row has its own.
        Of several draws, each array has an axis of them behind the leading one.
        """
        placements = zip(draws, self.place(*draws), strict=True)
        batches = [self._batch(draw, placement) for draw, placement in placements]
        if len(batches) == 1:
            return batches[0]
        return {name: np.stack([batch[name] for batch in batches], axis=1) for name in batches[0]}

    def place(self, *draws: Draw) -> list[Placement]:
        """Where the examples of each draw go; all have one shape."""
        return self.placing.place(*(sizes(self.splits, draw) for draw in draws))

    def _batch(self, draw: Draw, placement: Placement) -> Batch:
        tasks, _ = sizes(self.splits, draw)
        items = [
            (self.splits[task], i)
            for task, i in zip(tasks.tolist(), draw.examples.reshape(-1).tolist(), strict=True)
        ]
        batch = _arrays(items, placement, self.layout, self.shards)
        if len(draw.task_ids) == 1:
            of_rows = np.repeat(draw.task_ids, self.shards.local)
        else:
            of_rows = np.full(placement.shape.rows, draw.task_ids[0])
            of_rows[placement.row] = tasks
            of_rows = of_rows[self.shards.mine(placement.shape.rows)]
        batch["task_ids"] = self.shards.split(of_rows.astype(np.int32) + self.first_task)
        if not self.all_may_move and len(draw.task_ids) < self.num_tasks:
            batch["tasks"] = np.tile(self._may_move(draw), (self.shards.local, 1))
        return batch

    def _may_move(self, draw: Draw) -> np.ndarray:
        """int32 [U]: the tasks drawn, and others where they are fewer than the groups."""
        every = np.arange(self.num_tasks, dtype=np.int32)
        is_drawn = np.isin(every, draw.task_ids + self.first_task)
        return np.concatenate([every[is_drawn], every[~is_drawn]])[: len(draw.task_ids)]


def sizes(splits: Sequence[TokenizedSplit], draw: Draw) -> Sizes:
    """The tasks, int32, and the lengths, int64, of the examples of a draw, [G * b] each."""
    groups = zip(draw.task_ids.tolist(), draw.examples, strict=True)
    lengths = [splits[task].offsets[i + 1] - splits[task].offsets[i] for task, i in groups]
    return np.repeat(draw.task_ids, draw.examples.shape[1]), np.concatenate(lengths)


def eval_batches(
    split: TokenizedSplit, task_id: int, layout: Layout, placing: Padded | Packed, shards: Shards
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example of a split once, in no certain order.

    Yields:
        This host's part of a batch, as `step.make_eval_step` takes it, and of every place in the
        rows of all shards the index of its example, int64 [S * r, M]; -1 where there is none.
    """
    for indices, placement in placing.batches(split.lengths):
        batch = _arrays([(split, i) for i in indices.tolist()], placement, layout, shards)
        batch["task_ids"] = np.full((shards.local, 1), task_id, np.int32)
        examples = np.full((placement.shape.rows, placement.slots), -1)
        examples[placement.row, placement.slot] = indices
        yield batch, examples


def _arrays(
    items: Sequence[tuple[TokenizedSplit, int]],
    placement: Placement,
    layout: Layout,
    shards: Shards,
) -> Batch:
    """This host's rows of a batch of the examples (split, index)."""
    (rows, length), slots = placement.shape, placement.slots
    of_rows, of_slots = (rows, length), (rows, slots)
    batch: Batch = {
        "input_ids": np.full(of_rows, layout.pad_id, np.int32),
        "token_type_ids": np.zeros(of_rows, np.int32),
        "attention_mask": np.zeros(of_rows, np.int32),
        "first": np.zeros(of_slots, np.int32),
        "numbers": np.full(of_slots, -1, np.int32),
        "targets": np.zeros(of_slots, np.float32),
        "weights": np.zeros(of_slots, np.float32),
    }
    tokens = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for split, i in items]
    lengths = np.array([len(t) for t in tokens])
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(placement.row * length + placement.start, lengths) + within
    first = np.array([split.first[i] for split, i in items])
    types = (within >= np.repeat(first, lengths)) & (layout.token_types > 1)
    np.put(batch["input_ids"], at, np.concatenate(tokens))
    np.put(batch["token_type_ids"], at, types)
    np.put(batch["attention_mask"], at, np.repeat(placement.slot + 1, lengths))
    kept = [
        split.hidden[split.offsets[i] : split.offsets[i + 1]]
        for split, i in items
        if split.hidden is not None
    ]
    if kept:
        hidden = np.zeros((rows * length, kept[0].shape[1]), kept[0].dtype)
        hidden[at] = np.concatenate(kept)
        batch["hidden"] = hidden.reshape(rows, length, -1)
    place = placement.row, placement.slot
    batch["first"][place] = placement.start
    batch["numbers"][place] = np.arange(len(items))
    batch["targets"][place] = [split.targets[i] for split, i in items]
    batch["weights"][place] = 1.0
    return {name: shards.split(x[shards.mine(rows)]) for name, x in batch.items()}
