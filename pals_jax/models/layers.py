"""The arithmetic that the encoder and the adapters share.

Dimension letters, here and in every file of `models`:
    B rows    L positions    D hidden size    H heads    K size of a head    F feed-forward size
    N layers  T tasks        G task groups    S adapter size   P prefix length   C classes
    J positions attended to (L in self-attention)       M examples in a row     V vocabulary
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pals_jax.models.dropout import mask_bits
from pals_jax.models.kv_cache import KeyValueCache
from pals_jax.models.segments import Places, Segments

SAVED = "saved"  # the name of results that a stack's policy of recomputation keeps


def saved(x: Array) -> Array:
    """Keeps `x` for the backward pass: it is small beside what it takes to compute it again."""
    return checkpoint_name(x, SAVED)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x times the normal distribution's Phi(x), in float32 whatever the dtype of x.

    By erf, as in BERT and PyTorch. `jax.nn.gelu` uses erfc, which takes about 100 operations per
    element, five times as many. The forward pass saves the derivative, in the dtype of x, because
    XLA:TPU would compute it once for each tile of the products that read it.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_distribution(wide)).astype(x.dtype)


def _normal_distribution(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x / np.sqrt(2.0)))


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    below = _normal_distribution(wide)
    density = jnp.exp(-0.5 * jnp.square(wide)) / np.sqrt(2.0 * np.pi)
    return saved((wide * below).astype(x.dtype)), saved((below + wide * density).astype(x.dtype))


def _gelu_backward(derivative: Array, gradient: Array) -> tuple[Array]:
    return (gradient * derivative,)


gelu.defvjp(_gelu_forward, _gelu_backward)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "swish": jax.nn.silu,
}


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(scores: Array, dtype: Any) -> Array:
    """The softmax over the last axis, in `dtype`; of float32 scores.

    The backward pass reads the saved result and needs no scores.
    """
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _softmax_forward(scores: Array, dtype: Any) -> tuple[Array, Array]:
    weights = saved(softmax(scores, dtype))
    return weights, weights


def _softmax_backward(dtype: Any, weights: Array, gradient: Array) -> tuple[Array]:
    weights, gradient = weights.astype(jnp.float32), gradient.astype(jnp.float32)
    return (weights * (gradient - jnp.sum(weights * gradient, axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def dropout(
    x: Array, rate: float, key: Array | None, places: Places, columns: Array | None = None
) -> Array:
    """Inverted dropout; the identity where `key` is None.

    Args:
        x: [B, L, C] or [B, H, L, C].
        rate: the share of elements that are dropped.
        key: key of this dropout site in this step; None turns dropout off.
        places: the places of the positions.
        columns: see `mask_bits`.
    """
    if key is None or rate == 0.0:
        return x
    keep = mask_bits(key, places, x.shape, columns) >= np.uint32(rate * 2**32)
    # Barrier: otherwise XLA:TPU fuses and recomputes the mask in every consumer, and compiles twice
    # as long.
    keep = jax.lax.optimization_barrier(keep)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


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
    scores = jnp.einsum("bhqk,bhsk->bhqs", query, key, preferred_element_type=jnp.float32)
    # Barrier between scores and softmax, also in the backward pass: otherwise XLA:TPU computes the
    # softmax gradient twice, for queries and for keys, or overflows its stack (v6e).
    scores = jax.lax.optimization_barrier(scores)
    scores = scores / jnp.sqrt(jnp.float32(query.shape[-1]))
    scores = jnp.where(segments.mask, scores, jnp.finfo(jnp.float32).min)
    weights, places = softmax(scores, value.dtype), segments.places
    weights = dropout(weights, dropout_rate, dropout_key, places, segments.key_position)
    heads = jnp.einsum("bhqs,bhsk->bhqk", weights, value)
    return heads, jax.nn.logsumexp(scores, axis=-1)


def _attention_to_cache(
    query: Array, key: Array, value: Array, mask: Array, cache: KeyValueCache
) -> tuple[Array, Array]:
    """`dot_product_attention` of one position of a text, in L variants."""
    keys, values = cache.exchange(key, value)
    earlier = jnp.einsum("bhqk,bhsk->bhqs", query, keys, preferred_element_type=jnp.float32)
    own = jnp.einsum("bhqk,bhqk->bhq", query, key, preferred_element_type=jnp.float32)
    earlier = jnp.where(mask, earlier, jnp.finfo(jnp.float32).min)
    scores = jnp.concatenate([earlier, own[..., None]], axis=-1)
    scores = scores / jnp.sqrt(jnp.float32(query.shape[-1]))
    weights = softmax(scores, value.dtype)
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
