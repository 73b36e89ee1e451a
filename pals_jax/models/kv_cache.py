"""The key-value cache: what the attentions of a text have computed at earlier positions.

A step of generation computes one position of each text. An attention among the positions of a text,
be it a layer's own or an adapter's, takes the keys and values of earlier positions from the cache,
and leaves those of its own, which the caller writes there after the step.

Dimension letters: see `pals_jax.models.layers`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


class KeyValueCache:
    """The keys and values of one layer's attentions, in the order in which it computes them.

    It lives while a step is traced: entries go in, and `left` comes out.
    """

    def __init__(self, length: int, entries: Any = None) -> None:
        """Args:
        length: J, how many keys the cache has room for.
        entries: for each attention its keys and values [B, H, J, K]. None: all are zero.
        """
        self._length = length
        self._entries = None if entries is None else iter(entries)
        self._left: list[Any] = []

    @property
    def left(self) -> tuple[Any, ...]:
        """The keys and values of this step, for each attention, [B, H, L, K] both."""
        return tuple(self._left)

    def exchange(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Leaves keys and values [B, H, L, K] of an attention, and takes those [B, H, J, K]."""
        entry = self.take()
        self.leave((key, value))
        if entry is not None:
            return entry
        shape = (*key.shape[:2], self._length, key.shape[3])
        return jnp.zeros(shape, key.dtype), jnp.zeros(shape, value.dtype)

    def take(self) -> Any:
        """The entry of the next attention; None: it is zero."""
        return None if self._entries is None else next(self._entries)

    def leave(self, entry: Any) -> None:
        """Leaves what the next step takes in the same order."""
        self._left.append(entry)

    def inner(self, entries: Any) -> "KeyValueCache":
        """The cache of one of several layers, with its own entries."""
        return KeyValueCache(self._length, entries)


def empty(left: Any, length: int) -> Any:
    """Entries of zeros with room for `length` keys, for what a step leaves, or its shapes."""
    return jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], length, x.shape[-1]), x.dtype), left)


def write(entries: Any, left: Any, begin: Array) -> Any:
    """The entries of the cache with what a step has left, in place of their keys from `begin`."""

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, begin, axis=old.ndim - 2)

    return jax.tree.map(put, entries, left)
