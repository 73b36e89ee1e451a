"""Applying the model to a batch, and the evaluation steps."""

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import optax
from jax import Array, lax

from pals_jax.data.batch import Batch
from pals_jax.models.architectures import Model
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.segments import Packing
from pals_jax.models.seq2seq import Seq2SeqModel


def apply_to_batch(
    model: Model,
    variables: optax.Params,
    batch: Batch,
    slot_tasks: Array | None = None,
    **kwargs: Any,
) -> Array:
    """Logits float32 [B, M, C] of every example, or [B, K, V] of the words of target texts.

    Or what else a `method` of the model, among `kwargs`, gives.

    Args:
        model: the model.
        variables: its variables.
        batch: the batch.
        slot_tasks: see `MultiTaskModel`.
        **kwargs: passed to the model.
    """
    packing = Packing(batch.first, batch.example_ids)
    kwargs |= {"packing": packing, "hidden": batch.hidden}
    if isinstance(model, Seq2SeqModel):
        texts = batch.target_texts
        assert texts is not None
        source = batch.input_ids, batch.attention_mask
        target = texts.input_ids, texts.attention_mask
        kwargs["decoder_first"] = texts.first
        return cast(Array, model.apply(variables, *source, *target, batch.task_ids, **kwargs))
    kwargs["slot_tasks"] = slot_tasks
    return cast(Array, model.apply(variables, *batch.tokens, batch.task_ids, **kwargs))


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


def make_text_loss_step(
    model: Seq2SeqModel, axis_name: str | None = None
) -> Callable[[optax.Params, Batch], Array]:
    """The pure step from variables and a batch to the loss of each target text, [B, M].

    That is the sum over its tokens of -log p(token), without label smoothing; float32. With
    `axis_name`, every device returns the losses of all devices, in device order.
    """

    def text_loss_step(variables: optax.Params, batch: Batch) -> Array:
        hidden, texts = apply_to_batch(model, variables, batch, method="decode"), batch.target_texts
        assert texts is not None
        slots = jnp.arange(1, texts.first.shape[1] + 1)

        def of_row(row: tuple[Array, Array, Array]) -> Array:
            hidden, labels, mask = row
            logits: Any = model.apply(variables, hidden[None], method="logits")
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[0], labels)
            return jnp.sum(jnp.where(mask[:, None] == slots[None], losses[:, None], 0.0), axis=0)

        # One row at a time, because all logits, [B, K, V], would take too much memory.
        sums = lax.map(of_row, (hidden, texts.labels, texts.attention_mask))
        return sums if axis_name is None else lax.all_gather(sums, axis_name, tiled=True)

    return text_loss_step


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
