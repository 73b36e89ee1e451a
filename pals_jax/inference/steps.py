"""The model applied to a batch, and the evaluation steps made of it."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
from jax import Array

from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.segments import Packing

Tree = Any
Batch = Mapping[str, Array]
_TOKENS = ("input_ids", "token_type_ids", "attention_mask")


def make_eval_step(model: MultiTaskModel, axis_name: str | None = None) -> Callable[..., Array]:
    """The pure evaluation step: (variables, active) and a batch to logits, float32 [B, M, C].

    The batch is one of `make_train_step`, of which it needs tokens, places and task_ids. `active`,
    bool [N], says which layers keep their adapters; None: all. With `axis_name` every device
    returns the logits of all, in their order.
    """

    def eval_step(given: tuple[Tree, Array | None], batch: Batch) -> Array:
        variables, active = given
        logits = apply_to_batch(model, variables, batch, active=active)
        return logits if axis_name is None else jax.lax.all_gather(logits, axis_name, tiled=True)

    return eval_step


def make_every_task_step(
    model: MultiTaskModel, axis_name: str | None = None
) -> Callable[[Tree, Batch], Array]:
    """The pure step from variables and a batch to its logits under every task, [T, B, M, C]."""

    def every_task_step(variables: Tree, batch: Batch) -> Array:
        tokens = (batch[name] for name in _TOKENS)
        packing = Packing(batch["first"], batch["numbers"])
        logits = cast(Array, model.apply(variables, *tokens, packing, method="every_task"))
        if axis_name is None:
            return logits
        return jax.lax.all_gather(logits, axis_name, axis=1, tiled=True)

    return every_task_step


def apply_to_batch(model: MultiTaskModel, variables: Tree, batch: Batch, **kwargs: Any) -> Array:
    tokens = (batch[name] for name in _TOKENS)
    kwargs |= {"packing": Packing(batch["first"], batch["numbers"]), "hidden": batch.get("hidden")}
    return cast(Array, model.apply(variables, *tokens, batch["task_ids"], **kwargs))
