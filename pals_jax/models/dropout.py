"""Dropout, and the random bits of its masks: a keyed hash of each element's place.

JAX's default generator, threefry, costs more than the layer whose mask it draws; a hash that XLA
fuses into the multiplication is enough for a mask. The hash takes the dropout site (a key), the
example (a salt) and the element's place within the example, so that an example has the same masks
in any row, batch shape and device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.models.segments import Places

_STRIDE = 4096  # more than the positions of any example


def dropout(x: Array, rate: float, key: Array | None, places: Places) -> Array:
    """Inverted dropout; the identity where `key` is None.

    Args:
        x: [B, L, C] or [B, H, L, C].
        rate: the share of elements that are dropped.
        key: key of this dropout site in this step; None turns dropout off.
        places: the places of the positions.
    """
    return dropped(x, keep_mask(key, rate, places, x.shape), rate)


def dropped(x: Array, keep: Array | None, rate: float) -> Array:
    """x divided by 1 - rate where `keep` is, elsewhere 0; x where `keep` is None."""
    return x if keep is None else jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def keep_mask(
    key: Array | None,
    rate: float,
    places: Places,
    shape: tuple[int, ...],
    columns: Array | None = None,
) -> Array | None:
    """Which elements are not dropped, bool `shape`; None: all.

    Args:
        key: key of this dropout site in this step; None turns dropout off.
        rate: the share of elements that are dropped.
        places: see `mask_bits`.
        shape: see `mask_bits`.
        columns: see `mask_bits`.
    """
    if key is None or rate == 0.0:
        return None
    return mask_bits(key, places, shape, columns) >= np.uint32(rate * 2**32)


def mask_bits(
    key: Array, places: Places, shape: tuple[int, ...], columns: Array | None = None
) -> Array:
    """Random bits, uint32 `shape`.

    Each row (a position's, of one head) and each column has a well-mixed hash. An element combines
    them by an addition, an xor-shift, and a multiplication by an odd number of its row.

    Args:
        key: key of the dropout site in this step.
        places: the places of the positions; their salts must not be None.
        shape: (B, L, C) or (B, H, L, C).
        columns: int [B, C]; the place within the example that an element of the last axis stands
            for, where it is a position too. None: its index.
    """
    assert places.salt is not None
    lead = (shape[0], *[1] * (len(shape) - 3), shape[-2], 1)  # [B, (1,) L, 1]
    site = jax.random.key_data(key)
    row = places.position.reshape(lead)
    if len(shape) == 4:
        row = row + jnp.arange(shape[1]).reshape(1, -1, 1, 1) * _STRIDE
    salts = ((places.salt[..., i] ^ site[i]).reshape(lead) for i in range(2))
    offset, factor = (_mixed(row.astype(jnp.uint32) + salt) for salt in salts)
    if columns is None:
        columns = jnp.arange(shape[-1])[None]
    columns = columns.reshape(-1, *[1] * (len(shape) - 2), shape[-1])
    x = _mixed(columns.astype(jnp.uint32) + site[0]) ^ site[1]
    x = x + offset
    return (x ^ (x >> 16)) * (factor | 1)


def _mixed(x: Array) -> Array:
    """A 32-bit mixer: two rounds of xor-shift and multiply."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def mask_key(seed: int | Array, step: Array) -> Array:
    """The key of a step's dropout masks."""
    return jax.random.fold_in(jax.random.key(seed), step)


def example_salts(key: Array, example_ids: Array) -> Array:
    """One salt per example, so that masks differ between examples: int [...] -> uint32 [..., 2]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, example_ids.reshape(-1))
    return jax.random.key_data(keys).reshape(*example_ids.shape, 2)
