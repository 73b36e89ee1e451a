"""Dropout masks: the right rate, independent, and functions only of seed, step and example."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pals_jax.models.dropout import example_salts, mask_bits, mask_key
from pals_jax.models.segments import Places, make_segments

ROWS, LENGTH, SIZE = 64, 16, 384
ZERO = jnp.zeros((1, 1), int)


def places(numbers: Any, key: Any, length: int = LENGTH) -> Places:
    """One example in each row."""
    salts = example_salts(key, jnp.asarray(numbers)[:, None])
    return make_segments(jnp.ones((len(numbers), length), int), ZERO, salts).places


def bits(step: int) -> np.ndarray:
    key = mask_key(0, step)
    drawn = mask_bits(key, places(range(ROWS), key), (ROWS, LENGTH, SIZE))
    return np.asarray(drawn).reshape(ROWS, -1)


def test_bits_are_uniform() -> None:
    drawn = bits(3)
    for shift in range(0, 32, 4):
        counts = np.bincount((drawn >> shift & 15).ravel(), minlength=16)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_have_their_rate_and_do_not_resemble_each_other(rate: float) -> None:
    kept = bits(3) >= np.uint32(rate * 2**32)
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / kept.size)
    z = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    between_rows = (z @ z.T / np.sqrt(z.shape[1]))[~np.eye(ROWS, dtype=bool)]
    assert abs(between_rows).max() < 5.0  # standard normal
    assert between_rows.std() == pytest.approx(1.0, abs=0.05)
    for lag in (1, 2, 3, 16, 64, 384, 1024):
        along = (z[:, lag:] * z[:, :-lag]).sum() / np.sqrt(z[:, lag:].size)
        assert abs(along) < 4.5
    other = ((bits(4) >= np.uint32(rate * 2**32)) - (1 - rate)) / np.sqrt(rate * (1 - rate))
    assert abs((z * other).sum() / np.sqrt(z.size)) < 4.5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_columns_of_a_mask_do_not_resemble_each_other(rate: float) -> None:
    """Elements share the hashes of their row and of their column."""
    key, length = mask_key(1, 2), 4000
    drawn = mask_bits(key, places([0], key, length), (1, length, SIZE))
    kept = np.asarray(drawn[0] >= np.uint32(rate * 2**32))
    z = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    between_columns = (z.T @ z / np.sqrt(length))[~np.eye(SIZE, dtype=bool)]
    assert abs(between_columns).max() < 5.5  # standard normal
    assert between_columns.std() == pytest.approx(1.0, abs=0.02)


def test_an_example_has_its_masks_wherever_it_is() -> None:
    """Of hidden states and of attention, alone in a row or behind another."""
    key = mask_key(7, 11)
    alone = make_segments(jnp.ones((1, 4), int), ZERO, example_salts(key, jnp.array([[9]])))
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    salts = example_salts(key, jnp.array([[5, 9]]))
    shared = make_segments(segments, jnp.array([[0, 3]]), salts)
    hidden = [mask_bits(key, x.places, (1, x.mask.shape[-1], 6)) for x in (alone, shared)]
    np.testing.assert_array_equal(hidden[0], hidden[1][:, 3:7])
    heads = [
        mask_bits(key, x.places, (1, 2, length, length), x.places.position)
        for x, length in ((alone, 4), (shared, 8))
    ]
    np.testing.assert_array_equal(heads[0], heads[1][..., 3:7, 3:7])
    assert len(np.unique(heads[0])) == heads[0].size
    assert not np.array_equal(hidden[1][:, :3], hidden[1][:, 3:6])
    assert not np.array_equal(jax.random.key_data(mask_key(8, 11)), jax.random.key_data(key))
