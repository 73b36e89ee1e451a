"""Softmax attention: of all positions at once, and of one position to a cache.

The order of the axes and what the backward pass reads are chosen by the cycles that XLA:TPU
estimates; `docs/plan.md` says what else was tried.

Dimension letters: see `pals_jax.models.layers`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.models.dropout import dropped, keep_mask
from pals_jax.models.kv_cache import KeyValueCache
from pals_jax.models.layers import saved
from pals_jax.models.segments import Segments


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    segments: Segments,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Array, Array]:
    """Softmax attention with dropout on the attention weights, as in BERT.

    `jax.nn.dot_product_attention` has no dropout, which BERT is trained with.

    Args:
        query: [B, H, L, K]. The softmax is computed in float32 whatever its dtype.
        key: [B, H, J, K].
        value: [B, H, J, K].
        segments: their mask says which keys a query may attend to. With a cache, it is of the keys
            there, and each query attends also to the key of its own index.
        dropout_rate: probability with which an attention weight is dropped.
        dropout_key: random key; None turns dropout off.

    Returns:
        The output of the heads, [B, H, L, K] in the dtype of `value`, and the log of each softmax's
        denominator, float32 [B, H, L].
    """
    if segments.cache is not None:
        return _attention_to_cache(query, key, value, segments.mask, segments.cache)
    shape = (*query.shape[:3], key.shape[2])
    keep = keep_mask(
        dropout_key, dropout_rate, segments.places, shape, columns=segments.key_position
    )
    keep = None if keep is None else keep.swapaxes(2, 3)
    return _attention(query, key, value, segments.mask.swapaxes(2, 3), keep, dropout_rate)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    query: Array, key: Array, value: Array, mask: Array, keep: Array | None, rate: float
) -> tuple[Array, Array]:
    """`dot_product_attention` with masks [B, 1 or H, J, 1 or L].

    Scores are [B, H, J, L], because TPUs reduce the last axis at a greater cost.
    """
    return _attention_forward(query, key, value, mask, keep, rate)[0]


def _attention_forward(
    query: Array, key: Array, value: Array, mask: Array, keep: Array | None, rate: float
) -> tuple[tuple[Array, Array], Any]:
    scores = jnp.einsum("bhqk,bhsk->bhsq", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores / _scale(query), jnp.finfo(jnp.float32).min)
    largest = scores.max(axis=2, keepdims=True)
    exponentials = jnp.exp(scores - largest)
    denominator = saved(exponentials.sum(axis=2)[..., None])
    weights = saved(exponentials.astype(value.dtype))
    heads = jnp.einsum(
        "bhsq,bhsk->bhqk",
        *(dropped(weights, keep, rate), value),
        preferred_element_type=jnp.float32,
    )
    heads = saved((heads / denominator).astype(value.dtype))
    kept = saved(query), saved(key), saved(value), weights, denominator, keep
    return (heads, jnp.log(denominator[..., 0]) + largest[:, :, 0]), kept


def _attention_backward(
    rate: float, kept: Any, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    """The mean is of the gradients that it is subtracted from, as rounded as they are.

    That of what the heads give (as in FlashAttention) has rounding errors of its own, which in
    bfloat16 do not cancel over the keys: with keys far from 0, the error of queries is many times
    as large.
    """
    query, key, value, weights, denominator, keep = kept
    to_heads, to_log = gradients
    to_heads = (to_heads.astype(jnp.float32) / denominator).astype(value.dtype)
    given = dropped(weights, keep, rate)
    to_value = jnp.einsum("bhsq,bhqk->bhsk", given, to_heads)
    # What is dropped from weights is dropped from their gradients, so one mask serves for both.
    through = jnp.einsum("bhqk,bhsk->bhsq", to_heads, value).astype(jnp.float32)
    through = given.astype(jnp.float32) * through
    mean = (through.sum(axis=2) - to_log) / denominator[..., 0]
    to_scores = through - weights.astype(jnp.float32) * mean[:, :, None]
    # Barrier: two products read the result, and XLA:TPU would compute it for each of them.
    to_scores = jax.lax.optimization_barrier((to_scores / _scale(query)).astype(query.dtype))
    to_query = jnp.einsum("bhsq,bhsk->bhqk", to_scores, key)
    return to_query, jnp.einsum("bhsq,bhqk->bhsk", to_scores, query), to_value, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _scale(query: Array) -> np.float32:
    return np.sqrt(np.float32(query.shape[-1]))


def _attention_to_cache(
    query: Array, key: Array, value: Array, mask: Array, cache: KeyValueCache
) -> tuple[Array, Array]:
    """`dot_product_attention` of one position of a text, in L variants."""
    keys, values = cache.exchange(key, value)
    earlier = jnp.einsum("bhqk,bhsk->bhqs", query, keys, preferred_element_type=jnp.float32)
    own = jnp.einsum("bhqk,bhqk->bhq", query, key, preferred_element_type=jnp.float32)
    earlier = jnp.where(mask, earlier, jnp.finfo(jnp.float32).min)
    scores = jnp.concatenate([earlier, own[..., None]], axis=-1) / _scale(query)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    heads = jnp.einsum("bhqs,bhsk->bhqk", weights[..., :-1], values) + weights[..., -1:] * value
    return heads, jax.nn.logsumexp(scores, axis=-1)


def split_heads(x: Array, num_heads: int) -> Array:
    """[B, L, H * K] -> [B, H, L, K]: with heads as a batch axis both products are plain matmuls."""
    rows, length, _ = x.shape
    return x.reshape(rows, length, num_heads, -1).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """[B, H, L, K] -> [B, L, H * K]."""
    rows, _, length, _ = x.shape
    return x.swapaxes(1, 2).reshape(rows, length, -1)
