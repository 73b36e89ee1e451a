"""Segments: several examples may share a row of a batch without seeing each other.

`attention_mask` says which example of its row a position belongs to. The position within the
example and what it may attend to follow from it. An example has the same outputs and the same
dropout masks in any row, beside any other examples.

Dimension letters: see `pals_jax.models.layers`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pals_jax.models.kv_cache import KeyValueCache

_PROMPTS = 2048  # positions of prompts begin here, behind those of any text


class Packing(NamedTuple):
    """Where the M examples of each row are; if a row has fewer, the last ones are empty.

    Attributes:
        first: int [B, M]; the position of each example's first token.
        example_ids: int [B, M]; the index of each example in the whole batch, of which its dropout
            masks are a function.
    """

    first: Array
    example_ids: Array

    @classmethod
    def alone(cls, rows: int) -> "Packing":
        """Each row is one example, in order."""
        return cls(jnp.zeros((rows, 1), jnp.int32), jnp.arange(rows)[:, None])


class Places(NamedTuple):
    """What the dropout masks of a position are a function of.

    Attributes:
        position: int [B, L], within the example.
        salt: uint32 [B, L, 2]; the salt of the example. None: dropout is off.
    """

    position: Array
    salt: Array | None = None

    @classmethod
    def of_examples(cls, salts: Array | None, like: Array) -> "Places":
        """Places for arrays like `like`, [B, M, ...], which have one entry for each example."""
        return cls(jnp.zeros(like.shape[:2], jnp.int32), salts)


class Segments(NamedTuple):
    """What the blocks of a layer need to know of the examples in each row.

    Attributes:
        mask: bool [B, 1, 1 or L, J]; True where a position may attend to another. J is L but for
            attention to the positions of another text.
        places: see `Places`; one for each position.
        first: see `Packing`.
        segment_ids: int [B, L]; 0 at padding, else, from 1, which of its row's examples a position
            belongs to.
        key_position: int [B, J]; the places, within their examples, of the positions that are
            attended to. None: dropout is off.
        cache: of a step of generation, the keys and values of earlier positions. None: all
            positions are here.
    """

    mask: Array
    places: Places
    first: Array
    segment_ids: Array
    key_position: Array | None
    cache: KeyValueCache | None = None

    def inner(self, entries: Any) -> "Segments":
        """The same for one of several layers, with its own entries of the cache."""
        return self if self.cache is None else self._replace(cache=self.cache.inner(entries))

    @property
    def left(self) -> Any:
        """What has been left in the cache; None: there is no cache."""
        return None if self.cache is None else self.cache.left


def make_segments(
    segment_ids: Array,
    first: Array,
    salts: Array | None = None,
    prompts: int = 0,
    causal: bool = False,
) -> Segments:
    """The segments of a batch.

    Args:
        segment_ids: int [B, L]; 0 at padding, else, from 1, which of its row's examples a position
            belongs to.
        first: int [B, M]; see `Packing`.
        salts: uint32 [B, M, 2]; see `Places`. None: dropout is off.
        prompts: the number of positions that each example has at the end of its row; position p of
            example m is at L + p * M + m.
        causal: whether a position attends only to itself and to those before it, as in a decoder.
    """
    (rows, length), count = segment_ids.shape, first.shape[1]
    position = jnp.arange(length)[None] - _of_example(first, segment_ids)
    if count > 1:  # With one example per row, positions keep counting through padding, as in BERT.
        position = jnp.where(segment_ids > 0, position, 0)
    if prompts:
        index = jnp.broadcast_to(jnp.arange(prompts * count), (rows, prompts * count))
        segment_ids = jnp.concatenate([segment_ids, index % count + 1], axis=1)
        position = jnp.concatenate([position, _PROMPTS + index // count], axis=1)
    mask = _same_example(segment_ids, segment_ids, count)
    if causal:
        index = jnp.arange(segment_ids.shape[1])
        mask &= (index[:, None] >= index[None, :])[None, None]
    salt = None if salts is None else _of_example(salts, segment_ids)
    return Segments(mask, Places(position, salt), first, segment_ids, position)


def cross_segments(target: Segments, source: Segments) -> Segments:
    """The segments of attention from the positions of one text to those of another.

    A position attends to the whole source of its own example.

    Args:
        target: of the positions that attend, [B, L].
        source: of those that are attended to, [B, J]; with as many examples in each row.
    """
    mask = _same_example(target.segment_ids, source.segment_ids, source.first.shape[1])
    return target._replace(mask=mask, key_position=source.places.position, cache=None)


def next_position(position: Array, visible: Array) -> Segments:
    """The segments of a step of generation: one position of each row, computed in K variants.

    Args:
        position: int [B]; the position within the text.
        visible: bool [B, K, J]; which keys of the cache a variant attends to.
    """
    rows, variants, length = visible.shape
    places = Places(jnp.broadcast_to(position[:, None], (rows, variants)))
    first, ids = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, variants), jnp.int32)
    return Segments(visible[:, None], places, first, ids, None, KeyValueCache(length))


def _same_example(queries: Array, keys: Array, count: int) -> Array:
    """bool [B, 1, 1 or L, J] from ids [B, L] and [B, J]: keys of a query's own example."""
    mask = keys[:, None, None, :] > 0
    if count > 1:
        mine, theirs = queries[:, None, :, None], keys[:, None, None, :]
        mask &= (mine == theirs) | (mine == 0)
    return mask


def _of_example(values: Array, segment_ids: Array) -> Array:
    """[B, M, ...] -> [B, L, ...]: of the example that each position belongs to."""
    index = jnp.maximum(segment_ids - 1, 0).reshape(*segment_ids.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def one_position() -> Segments:
    """One position of one example, to find shapes with."""
    return make_segments(jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
