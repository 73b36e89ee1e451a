"""One training step and one evaluation step, pure functions of a state and a batch."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from pals_jax.errors import UserError
from pals_jax.models.adapters import overlay
from pals_jax.models.multitask import MultiTaskModel

Tree = Any
Batch = Mapping[str, Array]


class TrainState(struct.PyTreeNode):
    """All that a run is made of besides its config.

    Attributes:
        step: int32 scalar; the number of steps taken.
        trainable: the part of `variables` that is trained; alone has optimiser state.
        frozen: the rest.
        opt_state: the optimiser's.
    """

    step: Array
    trainable: Tree
    frozen: Tree
    opt_state: Tree

    @property
    def variables(self) -> Tree:
        """{"params", "adapters"}, whole again."""
        return overlay(self.frozen, self.trainable)


def partition(variables: Tree, rules: Sequence[str]) -> tuple[Tree, Tree]:
    """Divides `variables` into what is trained and what is frozen.

    Args:
        variables: {"params", "adapters"}.
        rules: patterns; a leaf is trained where one of them matches the beginning of its path,
            for example "adapters/" or "params/encoder/pooler".

    Raises:
        UserError: a rule that matches no leaf, or rules that train nothing.
    """
    leaves = flatten_dict(variables, sep="/")
    for rule in rules:
        try:
            matches = any(re.match(rule, path) for path in leaves)
        except re.error as error:
            raise UserError(f"the rule {rule!r} in trainable is no pattern: {error}.") from error
        if not matches:
            raise UserError(f"the rule {rule!r} in trainable matches no parameter.")
    if not rules:
        raise UserError("trainable is empty; name at least one rule, such as 'adapters/'.")
    chosen = {path: any(re.match(rule, path) for rule in rules) for path in leaves}
    return (
        unflatten_dict({path: x for path, x in leaves.items() if chosen[path]}, sep="/"),
        unflatten_dict({path: x for path, x in leaves.items() if not chosen[path]}, sep="/"),
    )


def example_losses(logits: Array, targets: Array, is_regression: Array) -> Array:
    """Each example's loss: cross-entropy, or the squared error of the first logit.

    Args:
        logits: float32 [B, C]; lowest finite value beyond a task's own outputs.
        targets: float32 [B]; a class id, or a regression target.
        is_regression: bool [B].

    Returns:
        float32 [B].
    """
    labels = jnp.where(is_regression, 0, targets).astype(jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(is_regression, jnp.square(logits[:, 0] - targets), cross_entropy)


def create_state(
    variables: Tree, rules: Sequence[str], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    trainable, frozen = partition(variables, rules)
    return TrainState(jnp.int32(0), trainable, frozen, optimizer.init(trainable))


def make_train_step(
    model: MultiTaskModel, optimizer: optax.GradientTransformationExtraArgs, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure training step.

    Its batch holds input_ids, token_type_ids, attention_mask (int32 [B, L]), task_ids (int32 [G]),
    targets and weights (float32 [B]; a weight of 0 leaves a row out). It returns the next state
    and the scalars loss (mean over the weighted rows) and grad_norm (before clipping). Its
    dropout masks are a function of (seed, step).
    """
    num_tasks = len(model.num_outputs)
    is_regression = np.asarray(model.num_outputs) == 1

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        # The "rbg" generator draws masks several times faster than the default one.
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)

        def loss_fn(trainable: Tree) -> Array:
            variables = overlay(state.frozen, trainable)
            logits = _logits(model, variables, batch, rngs={"dropout": key})
            rows_per_group = logits.shape[0] // batch["task_ids"].shape[0]
            regression = jnp.repeat(jnp.asarray(is_regression)[batch["task_ids"]], rows_per_group)
            losses = example_losses(logits, batch["targets"], regression)
            return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

        loss, grads = jax.value_and_grad(loss_fn)(state.trainable)
        # A group whose rows are all left out does not count as drawn.
        present = (batch["weights"].reshape(batch["task_ids"].shape[0], -1) > 0).any(axis=1)
        drawn = jnp.zeros(num_tasks, bool).at[batch["task_ids"]].max(present)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, drawn=drawn)
        trainable = optax.apply_updates(state.trainable, updates)
        state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state)
        return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return train_step


def make_eval_step(model: MultiTaskModel) -> Callable[..., Array]:
    """The pure evaluation step: variables and a batch to logits, float32 [B, C].

    A third argument, bool [N], says which layers keep their adapters; None: all.
    """

    def eval_step(variables: Tree, batch: Batch, active: Array | None = None) -> Array:
        return _logits(model, variables, batch, active=active)

    return eval_step


def _logits(model: MultiTaskModel, variables: Tree, batch: Batch, **kwargs: Any) -> Array:
    names = ("input_ids", "token_type_ids", "attention_mask", "task_ids")
    return cast(Array, model.apply(variables, *(batch[name] for name in names), **kwargs))
