"""The training step for any set of tasks: loss, gradients, update.

For evaluation, see `inference.steps`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from pals_jax.data.batch import Batch
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.optim import (
    TASKS,
    global_norm,
    moves_idle_tasks,
    task_trees,
    with_task_trees,
)
from pals_jax.models.adapters.bound import overlay
from pals_jax.models.architectures import Model, num_tasks
from pals_jax.models.compute_dtype import in_compute_dtype
from pals_jax.models.dropout import mask_key
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.task_axis import gather, scatter, spread
from pals_jax.runtime.division import Division
from pals_jax.runtime.errors import UserError
from pals_jax.training.losses import loss_weights, summed_loss


class TrainState(struct.PyTreeNode):
    """The complete state of a run, except its config.

    Attributes:
        step: int32 scalar; the number of steps taken.
        trainable: the part of `variables` that is trained; only this part has optimiser state.
        frozen: the rest of `variables`; during training `in_compute_dtype`.
        opt_state: the state of the optimiser.
    """

    step: Array
    trainable: optax.Params
    frozen: optax.Params
    opt_state: optax.OptState

    @property
    def variables(self) -> optax.Params:
        """{"params", "adapters"}: the trainable and the frozen part together."""
        # Without a method, an encoder-decoder has nothing that belongs to tasks.
        return {"adapters": {}, **overlay(self.frozen, self.trainable)}

    def in_compute_dtype(self, dtype: Any) -> "TrainState":
        """The state with frozen weights as the model casts them: see `models.compute_dtype`.

        This halves their memory and traffic; only checkpoints need them in float32.
        """
        return self.replace(frozen=in_compute_dtype(self.frozen, dtype))


def partition(variables: optax.Params, rules: Sequence[str]) -> tuple[optax.Params, optax.Params]:
    """Divides `variables` into the trained and the frozen part.

    Args:
        variables: {"params", "adapters"}.
        rules: regular expressions; a leaf is trained if one of them matches the beginning of its
            path, for example "adapters/" or "params/encoder/pooler".

    Raises:
        UserError: a rule that matches no leaf, or rules that train nothing.
    """
    leaves = flatten_dict(variables, sep="/")
    for rule in rules:
        try:
            matches = any(re.match(rule, path) for path in leaves)
        except re.error as error:
            raise UserError(
                f"the rule {rule!r} in trainable is not a regular expression: {error}."
            ) from error
        if not matches:
            raise UserError(f"the rule {rule!r} in trainable matches no parameter.")
    if not rules:
        raise UserError("trainable is empty; name at least one rule, such as 'adapters/'.")
    chosen = {path: any(re.match(rule, path) for rule in rules) for path in leaves}
    return (
        unflatten_dict({path: x for path, x in leaves.items() if chosen[path]}, sep="/"),
        unflatten_dict({path: x for path, x in leaves.items() if not chosen[path]}, sep="/"),
    )


def _slots(batch: Batch, count: int) -> tuple[Array, int]:
    """The slot of each group's task, int [G], and the number of slots, of `count` tasks."""
    if batch.slot_tasks is None:
        return batch.task_ids, count
    found = batch.task_ids[:, None] == batch.slot_tasks[None]
    num_slots = len(batch.slot_tasks)
    # A task without a slot gets an id out of range, for which the model returns NaN.
    return jnp.where(found.any(axis=1), found.argmax(axis=1), num_slots), num_slots


def _rows_of_tables(
    model: Model, batch: Batch, axis_name: str | None
) -> dict[tuple[str, ...], Array]:
    """The rows of BERT's words that a batch reads: for `Division.sum`, where it saves traffic.

    That is where all devices together read fewer rows than there are words.
    """
    words = batch.input_ids.reshape(-1)
    if axis_name is None or not isinstance(model, MultiTaskModel):
        return {}
    if words.size * jax.lax.psum(1, axis_name) < model.config.vocab_size:
        return {("params", "encoder", "embeddings", "word", "embedding"): words}
    return {}


def create_state(
    variables: optax.Params, rules: Sequence[str], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    trainable, frozen = partition(variables, rules)
    return TrainState(jnp.int32(0), trainable, frozen, optimizer.init(trainable))


def train_step_of(
    experiment: Experiment,
    optimizer: optax.GradientTransformationExtraArgs,
    division: Division | None = None,
    seed: int | Array | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The training step of an experiment; see `make_train_step`.

    Args:
        experiment: the experiment.
        optimizer: its optimiser, for one division or one run's learning rate.
        division: see `make_train_step`.
        seed: of the dropout masks; may be traced. None: the experiment's.
    """
    config = experiment.config
    return make_train_step(
        experiment.model(),
        optimizer,
        config.seed if seed is None else seed,
        division,
        label_smoothing=config.label_smoothing,
        moves_idle_tasks=moves_idle_tasks(config.optimizer),
    )


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int | Array,
    division: Division | None = None,
    *,
    label_smoothing: float = 0.0,
    moves_idle_tasks: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure training step.

    It returns the next state and the scalars loss (mean over the weighted examples, or over the
    tokens of target texts) and grad_norm (before clipping). Dropout masks are a function of seed,
    step and an example's id.

    Args:
        model: the model.
        optimizer: an optimiser whose update takes `drawn` (see `experiment.optim.per_task`).
        seed: the seed of the dropout masks.
        division: the devices, each of which has a part of the batch and of the divided weights.
            Loss and gradients are summed over all devices, gradients in the dtype of the
            computation, and divided once, so that every division of the batch gives the same step.
            None: there is one device.
        label_smoothing: of the loss of target texts; see `losses.token_losses`.
        moves_idle_tasks: whether the optimiser changes tasks without a slot, too; see
            `experiment.optim.moves_idle_tasks`.
    """
    division = division or Division()

    def in_slots(tree: optax.Params, slot_tasks: Array | None) -> optax.Params:
        return {k: gather(x, slot_tasks) if k == TASKS else x for k, x in tree.items()}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key, slot_tasks = mask_key(seed, state.step), batch.slot_tasks
        slot_ids, num_slots = _slots(batch, num_tasks(model))
        frozen, whole = (in_slots(x, slot_tasks) for x in (state.frozen, state.trainable))

        def loss_fn(trainable: optax.Params) -> Array:
            variables, rngs = overlay(frozen, trainable), {"dropout": key}
            return summed_loss(model, variables, batch, slot_ids, label_smoothing, rngs=rngs)

        if division.axes:  # what a device gathers, it needs only as the model casts it
            whole = division.gather(in_compute_dtype(whole, model.dtype))
            # Barrier: or XLA gathers again in every layer, forwards and backwards (v5e).
            whole = jax.lax.optimization_barrier(whole)
        loss, grads = jax.value_and_grad(loss_fn)(whole)
        # A task whose examples all have weight 0 does not count as drawn.
        of_groups = loss_weights(batch).reshape(len(slot_ids), -1).sum(axis=1)
        weights = jnp.zeros(num_slots).at[slot_ids].add(of_groups)
        loss, weights = division.sum((loss, weights))
        grads = division.sum(grads, model.dtype, _rows_of_tables(model, batch, division.axis_name))
        # Gather what the optimiser may move, and scatter it back at the end.
        movable = slot_tasks
        if moves_idle_tasks:
            movable, count = None, num_tasks(model)
            weights = spread(weights, slot_tasks, count)
            grads = {k: spread(x, slot_tasks, count) if k == TASKS else x for k, x in grads.items()}
        every = state.trainable.get(TASKS, {}), task_trees(state.opt_state)
        of_tasks, opt_trees = gather(every, movable)
        before = state.trainable | ({TASKS: of_tasks} if of_tasks else {})
        grads = jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, before)
        loss, grads = jax.tree.map(lambda x: x / jnp.sum(weights), (loss, grads))
        with jax.named_scope("optimizer"):
            opt_state = with_task_trees(state.opt_state, opt_trees)
            updates, opt_state = optimizer.update(grads, opt_state, before, drawn=weights > 0)
            trainable = optax.apply_updates(before, updates)
            grad_norm = global_norm(grads, division.totals)
        after = trainable.get(TASKS, {}), task_trees(opt_state)
        of_tasks, opt_trees = scatter(every, movable, after)
        trainable |= {TASKS: of_tasks} if of_tasks else {}
        opt_state = with_task_trees(opt_state, opt_trees)
        state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state)
        return state, {"loss": loss, "grad_norm": grad_norm}

    return train_step
