"""Applying the model to a batch, and the evaluation steps."""

from collections.abc import Callable
from typing import Any, cast

import optax
from jax import Array, lax

from pals_jax.data.batch import Batch
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.segments import Packing


def apply_to_batch(
    model: MultiTaskModel, variables: optax.Params, batch: Batch, **kwargs: Any
) -> Array:
    """Logits float32 [B, M, C] of every example; `kwargs` are passed to the model."""
    packing = Packing(batch.first, batch.example_ids)
    logits = model.apply(
        variables, *batch.tokens, batch.task_ids, packing=packing, hidden=batch.hidden, **kwargs
    )
    return cast(Array, logits)


def make_eval_step(model: MultiTaskModel, axis_name: str | None = None) -> Callable[..., Array]:
    """The pure evaluation step from (variables, active) and a batch to logits float32 [B, M, C].

    `active`, bool [N], selects the layers that keep their adapters; None: all. With `axis_name`,
    every device returns the logits of all devices, in device order.
    """

    def eval_step(given: tuple[optax.Params, Array | None], batch: Batch) -> Array:
        variables, active = given
        logits = apply_to_batch(model, variables, batch, active=active)
        return logits if axis_name is None else lax.all_gather(logits, axis_name, tiled=True)

    return eval_step


def make_every_task_step(
    model: MultiTaskModel, axis_name: str | None = None
) -> Callable[[optax.Params, Batch], Array]:
    """The pure step from variables and a batch to logits for every task, [T, B, M, C]."""

    def every_task_step(variables: optax.Params, batch: Batch) -> Array:
        packing = Packing(batch.first, batch.example_ids)
        logits = cast(Array, model.apply(variables, *batch.tokens, packing, method="every_task"))
        if axis_name is None:
            return logits
        return lax.all_gather(logits, axis_name, axis=1, tiled=True)

    return every_task_step


def make_pool_step(
    model: MultiTaskModel, axis_name: str | None = None
) -> Callable[[optax.Params, Batch], Array]:
    """The pure step from variables and a batch to what the heads read, [B, M, D] in `dtype`."""

    def pool_step(variables: optax.Params, batch: Batch) -> Array:
        packing = Packing(batch.first, batch.example_ids)
        arguments = *batch.tokens, batch.task_ids
        hidden = model.apply(variables, *arguments, packing=packing, method="encode")
        pooled = cast(Array, model.apply(variables, hidden, batch.task_ids, packing, method="pool"))
        return pooled if axis_name is None else lax.all_gather(pooled, axis_name, tiled=True)

    return pool_step
