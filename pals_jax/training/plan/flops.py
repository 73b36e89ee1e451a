"""Model FLOPs: counts a model's matrix products from its jaxpr, without compiling."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from pals_jax.models.adapters.bound import overlay
from pals_jax.models.architectures import Model
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.shapes import variable_shapes
from pals_jax.training.step import partition


def forward(model: Model, *room: int, kept: bool = False) -> int:
    """FLOPs of the matrix products of one row's forward pass.

    A multiply-add counts as two. Only matrix products are counted, as is usual.

    Args:
        model: the model; no arrays are created.
        *room: L, the positions of the row; of an encoder-decoder, of sources and of targets.
        kept: whether the model starts from cached hidden states below the first adapter.
    """
    return of_products(_sum_of_logits(model, room, kept), variable_shapes(model))


def training(model: Model, trainable: Sequence[str], *room: int, kept: bool = False) -> int:
    """The same for forward and backward pass, without recomputation.

    Args:
        model: the model.
        trainable: rules, see `pals_jax.training.step.partition`; frozen leaves get no gradient.
        *room: see `forward`.
        kept: see `forward`.
    """
    loss = _sum_of_logits(model.clone(remat=False), room, kept)
    trained, frozen = partition(variable_shapes(model), trainable)
    gradient = jax.grad(lambda trained, frozen: loss(overlay(frozen, trained)))
    return of_products(gradient, trained, frozen)


def of_products(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of the matrix products of any function; arguments may be shapes."""
    return _products(jax.make_jaxpr(function)(*arguments).jaxpr)


def _sum_of_logits(model: Model, room: tuple[int, ...], kept: bool) -> Any:
    """The sum of one row's logits, as a stand-in for the loss."""
    texts = [jnp.ones((1, length), jnp.int32) for length in room]
    size = model.config.stacks["encoder"].hidden_size
    hidden = jnp.zeros((1, room[0], size), model.dtype) if kept else None
    apply: Callable[..., Any] = partial(model.apply, hidden=hidden)
    # Tokens, their types and their mask; or tokens and mask of the source, and of the target.
    copies = 2 if isinstance(model, Seq2SeqModel) else 3
    arrays = [text for text in texts for _ in range(copies)]
    return lambda variables: apply(variables, *arrays, jnp.int32(0)).sum()


def _products(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(_products, _inner(equation.params)))
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs that an equation calls."""
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, Jaxpr):
            yield leaf
