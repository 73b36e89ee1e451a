"""The arithmetic that the encoder and the adapters share, beside attention and dropout.

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

SAVED = "saved"  # the name of results that a stack's policy of recomputation keeps


def saved(x: Array) -> Array:
    """Keeps `x` for the backward pass: it is small beside what it takes to compute it again."""
    return checkpoint_name(x, SAVED)


@jax.custom_vjp
def materialised(x: Array) -> Array:
    """x, written to memory before it is read.

    XLA:TPU would compute it once for each tile of the products that read it.
    """
    return jax.lax.optimization_barrier(x)


materialised.defvjp(lambda x: (materialised(x), None), lambda _, gradient: (gradient,))


@jax.custom_vjp
def gradient_materialised(x: Array) -> Array:
    """x, whose gradient is `materialised`."""
    return x


gradient_materialised.defvjp(
    lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),)
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Any) -> Array:
    """The layer norm of x, [..., D] -> [..., D] in `dtype`, computed in float32.

    The backward pass reads the normalised x, saved in `dtype`, and needs neither x nor what x is
    the sum of.

    Args:
        x: [..., D].
        scale: float32 [D].
        bias: float32 [D].
        epsilon: what is added to the variance.
        dtype: of the result.
    """
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, dtype: Any
) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    # The fast variance E[x^2] - E[x]^2 would lose digits that parity with PyTorch needs.
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(variance + epsilon)
    normalised = centred * factor
    result = (normalised * _expanded(scale, x) + _expanded(bias, x)).astype(dtype)
    like = jnp.zeros(0, x.dtype)
    return result, (saved(normalised.astype(dtype)), saved(factor), scale, like)


def _layer_norm_backward(
    epsilon: float, dtype: Any, kept: Any, gradient: Array
) -> tuple[Array, Array, Array]:
    del epsilon, dtype
    normalised, factor, scale, like = kept
    normalised, gradient = normalised.astype(jnp.float32), gradient.astype(jnp.float32)
    over_positions = tuple(range(gradient.ndim - 1))
    to_scale = (gradient * normalised).sum(axis=over_positions)
    to_bias = gradient.sum(axis=over_positions)
    gradient = gradient * _expanded(scale, gradient)
    along = (gradient * normalised).mean(axis=-1, keepdims=True)
    to_x = factor * (gradient - gradient.mean(axis=-1, keepdims=True) - normalised * along)
    return to_x.astype(like.dtype), to_scale.astype(scale.dtype), to_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _expanded(parameter: Array, x: Array) -> Array:
    """[D] with the rank of x, because rank promotion is an error."""
    return parameter.reshape((1,) * (x.ndim - 1) + (-1,))


def gelu(x: Array) -> Array:
    """x times the normal distribution's Phi(x), in float32 whatever the dtype of x.

    By erf, as in BERT and PyTorch. `jax.nn.gelu` uses erfc, which takes about 100 operations per
    element, five times as many.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 * (1.0 + jax.lax.erf(wide / np.sqrt(2.0))))).astype(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "swish": jax.nn.silu,
}
