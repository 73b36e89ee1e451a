"""Batches: what is packed, what is padded, what is masked, and that nothing is lost."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_jax.data.batches import Layout, TrainBatches, eval_batches
from pals_jax.data.packing import Packed, Padded, Shape
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.runtime.shards import Shards


def make_split(lengths, first_id: int = 100) -> TokenizedSplit:
    """Examples of the given lengths; tokens count upwards, the last two of each are of type 1."""
    lengths = np.array(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(first_id, first_id + offsets[-1], dtype=np.int32)
    targets = np.arange(len(lengths), dtype=np.float32)
    return TokenizedSplit(tokens, offsets, (lengths - 2).astype(np.int32), targets)


SPLITS = [make_split([4, 6, 5]), make_split([3, 9], first_id=500)]
MIXED = Draw(np.array([1, 0], np.int32), np.array([[1, 0], [2, 1]]))  # of 9, 3, 5, 6 tokens


def batches(placing: Any, **changes: Any) -> TrainBatches:
    fields = {"layout": Layout(), "shards": Shards(), "first_task": 0, "num_tasks": 2}
    return TrainBatches(SPLITS, placing=placing, **fields | changes)


# Where examples go


def test_padded_lengths_are_four():
    def lengths(longest: int) -> set[int]:
        placing, counts = Padded(1, longest), range(1, longest + 1)
        return {placing.place((np.zeros(1), np.array([n])))[0].shape.length for n in counts}

    assert lengths(128) == {32, 64, 96, 128}
    assert lengths(10) == {3, 6, 9, 10}


draws = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=24)


@given(st.lists(draws, min_size=1, max_size=4), st.integers(1, 8), st.sampled_from([0, 5]), draws)
def test_every_example_has_a_place_of_its_own(samples, shards: int, prompts: int, draw):
    """Among those that the shapes were chosen by, and among any others."""
    pairs = [tuple(np.array(column) for column in zip(*sample, strict=True)) for sample in samples]
    packed = Packed.choose(pairs, 1000, 24, 40, 384, shards, prompts)
    for tasks, lengths in (*pairs, tuple(np.array(column) for column in zip(*draw, strict=True))):
        (placement,) = packed.place((tasks, lengths))
        rows, length = placement.shape
        assert placement.shape in packed.shapes
        assert rows % shards == 0
        taken = np.full((rows, length), -1)
        for n, (row, start) in enumerate(zip(placement.row, placement.start, strict=True)):
            place = taken[row, start : start + lengths[n]]
            assert place.shape == (lengths[n],)
            assert (place == -1).all()
            place[:] = n
        for row in range(rows):
            mine = placement.row == row
            assert len(set(tasks[mine])) <= 1
            assert mine.sum() <= placement.slots
            in_order = placement.slot[mine][np.argsort(placement.start[mine])]
            np.testing.assert_array_equal(in_order, np.arange(mine.sum()))


def test_the_shapes_follow_the_data():
    """Batches of short and of long examples: hardly a position is wasted, few shapes serve all."""
    rng = np.random.default_rng(0)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        mean = rng.choice([11, 13, 28, 30, 40, 49, 53, 67])  # those of GLUE
        return np.zeros(32, int), np.clip(rng.normal(mean, mean / 3, 32), 5, 128).astype(int)

    packed = Packed.choose([sample() for _ in range(256)], 10_000, 32, 128, 768)
    assert 3 <= len(packed.shapes) <= 8
    assert packed.shapes[-1] == (32, 128)
    used = positions = 0
    for tasks, lengths in (sample() for _ in range(200)):
        used += lengths.sum()
        rows, length = packed.place((tasks, lengths))[0].shape
        positions += rows * length
    assert used > 0.8 * positions
    assert positions < 0.37 * 200 * 32 * 128


def test_more_examples_than_a_batch_are_refused():
    packed = Packed((Shape(2, 8),), 8)
    with pytest.raises(ValueError, match="3 examples are more than a batch of 2"):
        packed.place((np.zeros(3, int), np.full(3, 8)))


@pytest.mark.parametrize("placing", [Padded(4, 12, 4), Packed((Shape(4, 12),), 8)])
def test_the_hosts_make_the_parts_of_one_batch(placing: Any):
    whole = batches(placing, shards=Shards(4, 0, 4))(MIXED)
    parts = [batches(placing, shards=Shards(4, i, 2))(MIXED) for i in (0, 2)]
    assert whole.input_ids.shape == (4, 1, 9 if placing == Padded(4, 12, 4) else 12)
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


# What a batch holds


def test_a_padded_batch_holds_the_drawn_examples():
    batch = batches(Padded(4, 12), layout=Layout(pad_id=7))(MIXED)
    assert {len(x) for x in jax.tree.leaves(batch)} == {1}
    batch = jax.tree.map(lambda x: x[0], batch)
    np.testing.assert_array_equal(batch.task_ids, [1, 1, 0, 0])
    np.testing.assert_array_equal(batch.example_ids, np.arange(4)[:, None])
    np.testing.assert_array_equal(batch.first, np.zeros((4, 1)))
    np.testing.assert_array_equal(batch.targets[:, 0], [1, 0, 2, 1])
    np.testing.assert_array_equal(batch.weights, np.ones((4, 1)))
    np.testing.assert_array_equal(batch.attention_mask.sum(1), [9, 3, 5, 6])
    np.testing.assert_array_equal(batch.input_ids[0], range(503, 512))
    np.testing.assert_array_equal(batch.input_ids[2, :5], range(110, 115))
    np.testing.assert_array_equal(batch.token_type_ids[1], [0, 1, 1] + [0] * 6)
    np.testing.assert_array_equal(batch.input_ids[batch.attention_mask == 0], 7)
    assert batch.input_ids.dtype == np.int32
    assert batch.targets.dtype == np.float32


def test_a_packed_batch_holds_them_too():
    packed = Packed((Shape(3, 16), Shape(4, 16)), 4)
    batch = jax.tree.map(lambda x: x[0], batches(packed, layout=Layout(pad_id=7))(MIXED))
    np.testing.assert_array_equal(batch.task_ids, [0, 1, 1])  # the last one is empty
    np.testing.assert_array_equal(batch.example_ids, [[3, 2, -1, -1], [0, 1, -1, -1], [-1] * 4])
    np.testing.assert_array_equal(batch.first, [[0, 6, 0, 0], [0, 9, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch.targets, [[1, 2, 0, 0], [1, 0, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch.weights, batch.example_ids >= 0)
    np.testing.assert_array_equal(batch.attention_mask[0], [1] * 6 + [2] * 5 + [0] * 5)
    np.testing.assert_array_equal(batch.attention_mask[1], [1] * 9 + [2] * 3 + [0] * 4)
    np.testing.assert_array_equal(batch.input_ids[0, 6:11], range(110, 115))
    np.testing.assert_array_equal(batch.token_type_ids[1, :12], [0] * 7 + [1] * 2 + [0, 1, 1])
    np.testing.assert_array_equal(batch.input_ids[batch.attention_mask == 0], 7)


def test_the_tasks_with_slots():
    """Those drawn, and any other where a batch has fewer tasks than groups; nothing means all."""
    draw = Draw(np.array([1, 1], np.int32), np.array([[1, 0], [1, 0]]))
    one = batches(Padded(4, 12), first_task=3, num_tasks=5)(draw)
    np.testing.assert_array_equal(one.slot_tasks, [[4, 0]])
    np.testing.assert_array_equal(one.task_ids, [[4] * 4])
    assert batches(Padded(4, 12), num_tasks=2)(draw).slot_tasks is None


def test_an_encoder_with_one_token_type_gets_one():
    one, two = (batches(Padded(4, 12), layout=Layout(0, types))(MIXED) for types in (1, 2))
    assert one.token_type_ids.max() == 0
    assert two.token_type_ids.max() == 1


@pytest.mark.parametrize("count", [1, 7, 8, 9])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("placing", [Padded, Packed.into])
def test_evaluation_sees_every_example_once(count: int, shards: int, placing: Any):
    rng = np.random.default_rng(count)
    split, layout = make_split(rng.integers(3, 40, count)), Layout()
    seen = []
    parts = Shards(shards, 0, shards)
    for batch, examples in eval_batches(split, 2, layout, placing(4, 40, shards), parts):
        np.testing.assert_array_equal(batch.task_ids, np.full((shards, 1), 2))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        np.testing.assert_array_equal(rows.weights, examples >= 0)
        for row, slot in np.argwhere(examples >= 0):
            index = examples[row, slot]
            tokens = split.tokens[split.offsets[index] : split.offsets[index + 1]]
            mine = rows.input_ids[row][rows.attention_mask[row] == slot + 1]
            np.testing.assert_array_equal(mine, tokens)
            assert rows.targets[row, slot] == split.targets[index]
        seen += examples[examples >= 0].tolist()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("prompts", [0, 20])
@pytest.mark.parametrize("max_length", [4, 6, 16])
def test_texts_of_a_word_are_given_a_place(max_length: int, prompts: int):
    """Where all are shorter than what an example is given at least, or that is more than a row."""
    few = np.zeros(5, np.int64), np.full(5, 3)
    packed = Packed.choose([few] * 9, 1000, 5, max_length, 12, prompts=prompts)
    (placement,) = packed.place(few)
    assert placement.slot.max() < placement.slots
    for here, placement in Packed.into(2, max_length, prompts=prompts).batches(few[1]):
        assert placement.slot.max() < placement.slots
        assert len(set(zip(placement.row, placement.slot, strict=True))) == len(here)


def test_evaluation_fills_its_rows():
    """Ten thousand examples of GLUE's lengths, in one shape, leave 2% of it empty."""
    lengths = np.random.default_rng(0).lognormal(3.4, 0.5, 10_000).clip(5, 128).astype(np.int64)
    shapes = [placement.shape for _, placement in Packed.into(16, 128).batches(lengths)]
    assert set(shapes) == {Shape(16, 128)}
    assert lengths.sum() > 0.98 * len(shapes) * 16 * 128
