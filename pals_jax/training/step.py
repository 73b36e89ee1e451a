"""One training step and one evaluation step, pure functions of a state and a batch."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from pals_jax.experiment.optim import TASKS, task_trees, with_task_trees
from pals_jax.inference.steps import apply_to_batch
from pals_jax.models.adapters.bound import overlay
from pals_jax.models.dropout import mask_key
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.task_axis import gather, scatter
from pals_jax.runtime.errors import UserError

Tree = Any
Batch = Mapping[str, Array]
_TOKENS = ("input_ids", "token_type_ids", "attention_mask")


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
    model: MultiTaskModel,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure training step.

    Its batch holds, for B rows of up to M examples each,
        input_ids, token_type_ids, attention_mask: int32 [B, L], as the model takes them;
        hidden: [B, L, D], as the model takes it, or not there;
        first, numbers: int32 [B, M]; see `Packing`;
        targets, weights: float32 [B, M]; a weight of 0 leaves an example out;
        task_ids: int32 [G]: those of G equal, consecutive groups of rows;
        tasks: int32 [U], different ones with all of `task_ids`, the only ones that may move; or not
            there: all may.
    It returns the next state and the scalars loss (mean over the weighted examples) and grad_norm
    (before clipping). Its dropout masks are a function of seed, step and an example's number.

    Args:
        model: the model.
        optimizer: whose update takes `drawn` (see `experiment.optim.per_task`).
        seed: of the dropout masks.
        axis_name: of the devices that have a part of the batch each. Loss and gradients are sums
            over the examples of all of them, divided once: any division gives the same step.
    """
    is_regression = np.asarray(model.num_outputs) == 1

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key, tasks = mask_key(seed, state.step), batch.get("tasks")
        count, task_ids = len(is_regression), batch["task_ids"]
        if tasks is not None:
            count, found = len(tasks), task_ids[:, None] == tasks[None]
            # A task that is not among them is out of range, where the model says NaN.
            task_ids = jnp.where(found.any(axis=1), found.argmax(axis=1), count)
        # What belongs to tasks is read of `tasks` alone, and written back at the end.
        every = state.trainable.get(TASKS, {}), task_trees(state.opt_state)
        of_tasks, opt_trees = gather(every, tasks)
        before = state.trainable | ({TASKS: of_tasks} if of_tasks else {})
        frozen = {k: gather(v, tasks) if k == TASKS else v for k, v in state.frozen.items()}

        def loss_fn(trainable: Tree) -> Array:
            logits = apply_to_batch(
                model,
                overlay(frozen, trainable),
                {**batch, "task_ids": task_ids},
                tasks=tasks,
                rngs={"dropout": key},
            )
            per_group = batch["targets"].size // len(task_ids)
            regression = jnp.repeat(jnp.asarray(is_regression)[batch["task_ids"]], per_group)
            outputs = logits.reshape(-1, logits.shape[-1])
            losses = example_losses(outputs, batch["targets"].reshape(-1), regression)
            return jnp.sum(losses * batch["weights"].reshape(-1))

        loss, grads = jax.value_and_grad(loss_fn)(before)
        # A task whose examples are all left out does not count as drawn.
        of_groups = batch["weights"].reshape(len(task_ids), -1).sum(axis=1)
        weights = jnp.zeros(count).at[task_ids].add(of_groups)
        if axis_name is not None:
            loss, grads, weights = jax.lax.psum((loss, grads, weights), axis_name)
        loss, grads = jax.tree.map(lambda x: x / jnp.sum(weights), (loss, grads))
        updates, opt_state = optimizer.update(
            grads, with_task_trees(state.opt_state, opt_trees), before, drawn=weights > 0
        )
        trainable = optax.apply_updates(before, updates)
        after = trainable.get(TASKS, {}), task_trees(opt_state)
        of_tasks, opt_trees = scatter(every, tasks, after)
        trainable |= {TASKS: of_tasks} if of_tasks else {}
        opt_state = with_task_trees(opt_state, opt_trees)
        state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state)
        return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return train_step
