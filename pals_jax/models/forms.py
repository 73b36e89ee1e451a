"""The forms of an adapter: small functions of a hidden state, with parameters that a task owns.

A form says which parameters it has for one task at one place, and computes its delta from them.
It knows neither the encoder nor the task: the parameters reach it already selected, with a
leading axis G of task groups; the B rows of its input belong to these groups in equal,
consecutive shares.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jax import Array

from pals_jax.errors import UserError
from pals_jax.models.layers import ACTIVATIONS, dot_product_attention, merge_heads, split_heads

INITIALIZER_RANGE = 0.02  # "new weights N(0, .02), biases 0" (Stickland & Murray, code)

Theta = Mapping[str, Any]


class Param(NamedTuple):
    """Shape of one parameter for one task at one place, and its initialiser.

    The initialiser is asked for all tasks and places at once, as leading axes of the shape.
    """

    shape: tuple[int, ...]
    init: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a form may know of its surroundings.

    Attributes:
        mask: bool [B, 1, 1 or L, L]; True where a position may look at another.
        dropout_rate: probability with which an attention weight is dropped.
        dropout_key: key of this place in this step; None turns dropout off.
    """

    mask: Array
    dropout_rate: float
    dropout_key: Array | None


class Form(Protocol):
    """A function of a hidden state with parameters of its own."""

    def parameters(self, hidden_size: int) -> Mapping[str, Mapping[str, Param]]:
        """Projections by name, each with a kernel and a bias."""

    def __call__(self, theta: Theta, x: Array, context: Context) -> Array:
        """The delta, of the shape and dtype of `x` [B, L, D]; leaves of `theta` lead with G."""


def dense(inputs: int, outputs: int) -> Mapping[str, Param]:
    """The parameters of one projection."""
    return {
        "kernel": Param((inputs, outputs), jax.nn.initializers.normal(INITIALIZER_RANGE)),
        "bias": Param((outputs,), jax.nn.initializers.zeros),
    }


def project(theta: Theta, x: Array) -> Array:
    """x W + b with each group's own W and b.

    Args:
        theta: kernel [G, D, S] and bias [G, S].
        x: [B, ..., D], B a multiple of G.

    Returns:
        [B, ..., S] in the dtype of `x`.
    """
    kernel, bias = theta["kernel"].astype(x.dtype), theta["bias"].astype(x.dtype)
    y = x.reshape(kernel.shape[0], -1, x.shape[-1]) @ kernel + bias[:, None]
    return y.reshape(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """W_up act(W_down x): with activation "identity" a low-rank layer (V_D V_E h)."""

    size: int
    activation: str = "identity"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_activation(self.activation)

    def parameters(self, hidden_size: int) -> Mapping[str, Mapping[str, Param]]:
        return {"down": dense(hidden_size, self.size), "up": dense(self.size, hidden_size)}

    def __call__(self, theta: Theta, x: Array, context: Context) -> Array:
        del context
        return project(theta["up"], ACTIVATIONS[self.activation](project(theta["down"], x)))


@dataclasses.dataclass(frozen=True)
class ProjectedAttention:
    """V_D MH(V_E h): multi-head attention in a small space (Stickland & Murray, section 3.3).

    Its attention has no output projection, and an activation follows V_D, as in the authors' code.
    """

    size: int
    heads: int
    activation: str = "gelu"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_activation(self.activation)
        if not isinstance(self.heads, int) or self.heads < 1 or self.size % self.heads:
            raise UserError(
                f"size {self.size} of the projected attention is not a multiple of its"
                f" {self.heads} heads; choose a size that is, or another number of heads."
            )

    def parameters(self, hidden_size: int) -> Mapping[str, Mapping[str, Param]]:
        attention = {name: dense(self.size, self.size) for name in ("query", "key", "value")}
        up = dense(self.size, hidden_size)
        return {"down": dense(hidden_size, self.size), **attention, "up": up}

    def __call__(self, theta: Theta, x: Array, context: Context) -> Array:
        z = project(theta["down"], x)
        query, key, value = (
            split_heads(project(theta[name], z), self.heads) for name in ("query", "key", "value")
        )
        heads = dot_product_attention(
            query,
            key,
            value,
            context.mask,
            dropout_rate=context.dropout_rate,
            dropout_key=context.dropout_key,
        )
        return ACTIVATIONS[self.activation](project(theta["up"], merge_heads(heads)))


def _check_size(size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise UserError(f"an adapter's size must be a whole number from 1, not {size!r}.")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"unknown activation {activation!r}; known are {known}.")
