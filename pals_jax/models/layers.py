"""The arithmetic that the encoder and the adapters share.

Dimension letters, here and in every file of `models`:
    B rows    L positions    D hidden size    H heads    K size of a head    F feed-forward size
    N layers  T tasks        G task groups    S adapter size   P prefix length   C classes
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "swish": jax.nn.silu,
}


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout with a mask drawn from `key`; the identity where `key` is None."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Array, Array]:
    """Softmax attention with dropout on its probabilities, as BERT has it.

    `jax.nn.dot_product_attention` computes the same but has no dropout, which BERT trains with.

    Args:
        query: [B, H, L, K]. The softmax is computed in float32 whatever its dtype.
        key: [B, H, L, K].
        value: [B, H, L, K].
        mask: bool, broadcastable to [B, H, L, L]; True where a query may look at a key.
        dropout_rate: probability with which an attention weight is dropped.
        dropout_key: random key; None turns dropout off.

    Returns:
        What the heads give, [B, H, L, K] in the dtype of `value`, and the logarithm of each
        softmax's denominator, float32 [B, H, L].
    """
    scores = jnp.einsum("bhqk,bhsk->bhqs", query, key, preferred_element_type=jnp.float32)
    scores = scores / jnp.sqrt(jnp.float32(query.shape[-1]))
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = dropout(weights, dropout_rate, dropout_key)
    heads = jnp.einsum("bhqs,bhsk->bhqk", weights, value)
    return heads, jax.nn.logsumexp(scores, axis=-1)


def split_heads(x: Array, num_heads: int) -> Array:
    """[B, L, H * K] -> [B, H, L, K]: with the heads outside, both products are plain matmuls."""
    rows, length, _ = x.shape
    return x.reshape(rows, length, num_heads, -1).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """[B, H, L, K] -> [B, L, H * K]."""
    rows, _, length, _ = x.shape
    return x.swapaxes(1, 2).reshape(rows, length, -1)
