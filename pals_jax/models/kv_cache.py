"""The key-value cache: what the attentions of a text have computed at earlier positions.

A step of generation computes one position of each text. An attention among the positions of a text,
be it a layer's own or an adapter's, takes the keys and values of the earlier positions from the
cache and leaves those of its own there.

Dimension letters: see `pals_jax.models.layers`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


class KeyValueCache:
    """The keys and values of one layer's attentions, in the order in which it computes them.

    It lives while a step is traced: `entries` of the step before go in, and `left` comes out.
    """

    def __init__(self, begin: Array, length: int, entries: Any = None) -> None:
        """Args:
        begin: int scalar; where in the cache the step's keys and values go.
        length: J, the keys that the cache has room for.
        entries: for each attention its keys and values [B, H, J, K], as `left` holds them. None:
            there are none yet, and all will be zero but for the step's.
        """
        self._begin, self._length = begin, length
        self._entries = None if entries is None else iter(entries)
        self._left: list[Any] = []

    @property
    def left(self) -> tuple[Any, ...]:
        """The entries, with those of this step in."""
        return tuple(self._left)

    def extend(self, key: Array, value: Array) -> tuple[Array, Array]:
        """A step's keys and values [B, H, L, K] -> those of all positions [B, H, J, K]."""
        entry = self.take()
        if entry is None:
            shape = (*key.shape[:2], self._length, key.shape[3])
            entry = jnp.zeros(shape, key.dtype), jnp.zeros(shape, value.dtype)
        begin = (0, 0, self._begin, 0)
        entry = tuple(
            jax.lax.dynamic_update_slice(old, new, begin)
            for old, new in zip(entry, (key, value), strict=True)
        )
        self.leave(entry)
        return entry

    def take(self) -> Any:
        """The next entry of the step before; None: there is none yet."""
        return None if self._entries is None else next(self._entries)

    def leave(self, entry: Any) -> None:
        """Leaves an entry, which the next step takes in the same order."""
        self._left.append(entry)

    def inner(self, entries: Any) -> "KeyValueCache":
        """The cache of one of several layers, with its own entries."""
        return KeyValueCache(self._begin, self._length, entries)
