"""Batches: what is padded, what is masked, and that nothing is lost."""

import numpy as np
import pytest

from pals_jax.data.batches import Layout, eval_batches, padded_length, train_batch
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenize import TokenizedSplit


def make_split(lengths, first_id: int = 100) -> TokenizedSplit:
    """Examples of the given lengths; tokens count upwards, the last two of each are of type 1."""
    lengths = np.array(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(first_id, first_id + offsets[-1], dtype=np.int32)
    targets = np.arange(len(lengths), dtype=np.float32)
    return TokenizedSplit(tokens, offsets, (lengths - 2).astype(np.int32), targets)


def test_padded_lengths_are_four():
    assert {padded_length(n, 128) for n in range(1, 129)} == {32, 64, 96, 128}
    assert {padded_length(n, 10) for n in range(1, 11)} == {3, 5, 8, 10}
    assert all(padded_length(n, 48) >= n for n in range(1, 49))


def test_train_batch_holds_the_drawn_examples():
    splits = [make_split([4, 6, 5]), make_split([3, 9], first_id=500)]
    draw = Draw(np.array([1, 0], np.int32), np.array([[1, 0], [2, 1]]))
    batch = train_batch(splits, draw, Layout(12, pad_id=7))
    np.testing.assert_array_equal(batch["task_ids"], [1, 0])
    np.testing.assert_array_equal(batch["targets"], [1, 0, 2, 1])
    np.testing.assert_array_equal(batch["weights"], np.ones(4))
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [9, 3, 5, 6])
    np.testing.assert_array_equal(batch["input_ids"][0], range(503, 512))
    np.testing.assert_array_equal(batch["input_ids"][2, :5], range(110, 115))
    np.testing.assert_array_equal(batch["token_type_ids"][1], [0, 1, 1] + [0] * 6)
    np.testing.assert_array_equal(batch["input_ids"][batch["attention_mask"] == 0], 7)
    assert batch["input_ids"].dtype == np.int32
    assert batch["targets"].dtype == np.float32


def test_an_encoder_with_one_token_type_gets_one():
    draw = Draw(np.array([0], np.int32), np.array([[1, 0]]))
    one, two = (train_batch([make_split([4, 6])], draw, Layout(12, 0, n)) for n in (1, 2))
    assert one["token_type_ids"].max() == 0
    assert two["token_type_ids"].max() == 1


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_evaluation_sees_every_example_once(count):
    rng = np.random.default_rng(count)
    split = make_split(rng.integers(3, 40, count))
    seen = []
    for batch, indices in eval_batches(split, task_id=2, batch_size=4, layout=Layout(40)):
        assert batch["input_ids"].shape[0] == 4
        np.testing.assert_array_equal(batch["task_ids"], [2])
        np.testing.assert_array_equal(batch["weights"], np.arange(4) < len(indices))
        np.testing.assert_array_equal(batch["targets"][: len(indices)], split.targets[indices])
        for row, index in enumerate(indices):
            tokens = split.tokens[split.offsets[index] : split.offsets[index + 1]]
            np.testing.assert_array_equal(batch["input_ids"][row, : len(tokens)], tokens)
        seen += indices.tolist()
    assert sorted(seen) == list(range(count))
