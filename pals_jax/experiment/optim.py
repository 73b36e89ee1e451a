"""The optimiser: one for the shared encoder, and one per task along the task axis.

A task's parameters, moments and step count are rows of the task axis, so the tasks' optimisers are
one optax transformation under `jax.vmap`. `per_task` decides what happens to tasks that a step did
not draw.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from pals_jax.runtime.errors import UserError

TASKS = "adapters"  # the collection of leaves with a leading task axis


def bert_schedule(peak: float, warmup: float, total_steps: int) -> optax.Schedule:
    """BERT's schedule: linear warm-up over `warmup` of all steps, then peak * (1 - step / total).

    At the end of warm-up the rate jumps from the peak to (1 - warmup) times the peak (Stickland &
    Murray, code).
    """

    def schedule(step: Array) -> Array:
        done = step / total_steps
        return peak * jnp.where(done < warmup, done / max(warmup, 1e-12), jnp.maximum(1 - done, 0))

    return schedule


def linear_schedule(peak: float, warmup: float, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` of all steps, then linear decay to 0 (Houlsby et al., 3.1)."""
    rise = round(warmup * total_steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, rise),
            optax.linear_schedule(peak, 0.0, max(total_steps - rise, 1)),
        ],
        [rise],
    )


LEARNING_RATE_SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "bert": bert_schedule,
    "linear": linear_schedule,
}


class PerTaskState(NamedTuple):
    """State of `per_task`.

    Attributes:
        shared: the inner state for the parameters that all tasks share.
        tasks: the inner states of all tasks, every leaf with a leading task axis.
        started: bool [T]; whether each task has been drawn at least once.
    """

    shared: optax.OptState
    tasks: optax.OptState
    started: Array


def per_task(
    inner: optax.GradientTransformation, num_tasks: int, *, idle_drift: bool
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` once on the shared tree, and once per task on the task's rows.

    The update takes gradients, parameters and state of all tasks, or of a subset chosen with
    `map_tasks`, and `drawn`, a bool for each of these tasks. Tasks that are not drawn keep
    parameters and state exactly; with `idle_drift`, a task that has been drawn before is updated
    with a zero gradient, so that momentum and weight decay still move it (Stickland & Murray,
    code).

    Args:
        inner: any transformation that treats tasks independently.
        num_tasks: T.
        idle_drift: whether tasks that a step did not draw keep moving.
    """

    def split(tree: optax.Params) -> tuple[optax.Params, optax.Params]:
        return {k: v for k, v in tree.items() if k != TASKS}, tree.get(TASKS, {})

    def init(params: optax.Params) -> PerTaskState:
        shared, tasks = split(params)
        started = jnp.zeros(num_tasks, bool)
        return PerTaskState(
            inner.init(shared), jax.vmap(inner.init, axis_size=num_tasks)(tasks), started
        )

    def update(
        grads: optax.Updates, state: PerTaskState, params: optax.Params, *, drawn: Array, **_: Any
    ) -> tuple[optax.Updates, PerTaskState]:
        shared_grads, task_grads = split(grads)
        shared_params, task_params = split(params)
        updates, shared = inner.update(shared_grads, state.shared, shared_params)
        each_task = jax.vmap(inner.update, axis_size=len(drawn))
        moved, tasks = each_task(task_grads, state.tasks, task_params)
        active = (drawn | state.started) if idle_drift else drawn

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        moved = jax.tree.map(keep, moved, jax.tree.map(jnp.zeros_like, moved))
        tasks = jax.tree.map(keep, tasks, state.tasks)
        updates = updates | ({TASKS: moved} if TASKS in grads else {})
        return updates, PerTaskState(shared, tasks, drawn | state.started)

    return optax.GradientTransformationExtraArgs(init, update)


def map_tasks(
    change: Callable[..., optax.OptState], state: optax.OptState, *others: optax.OptState
) -> optax.OptState:
    """Applies `change` to the per-task parts of an optimiser's state, e.g. `task_axis.append`.

    Args:
        change: a function of trees with a leading task axis (moments, step counts, and which tasks
            have started), one tree from each state.
        state: a state that contains a `PerTaskState`; its other parts are kept.
        others: further states of an optimiser of the same kind.
    """
    trees = zip(*(task_trees(each) for each in (state, *others)), strict=True)
    return with_task_trees(state, [change(*each) for each in trees])


def task_trees(state: optax.OptState) -> list[optax.OptState]:
    """The per-task parts of each `PerTaskState` in an optimiser's state; leaves [T, ...]."""
    nodes = jax.tree.leaves(state, is_leaf=_is_per_task)
    return [{"tasks": x.tasks, "started": x.started} for x in nodes if _is_per_task(x)]


def with_task_trees(state: optax.OptState, trees: list[optax.OptState]) -> optax.OptState:
    """`state` with its per-task parts replaced; the inverse of `task_trees`."""
    left = iter(trees)
    return jax.tree.map(
        lambda x: x._replace(**next(left)) if _is_per_task(x) else x, state, is_leaf=_is_per_task
    )


def _is_per_task(x: Any) -> bool:
    return isinstance(x, PerTaskState)


Totals = Callable[[Any], Any]  # makes sums over whole leaves of sums over a device's parts


def _undivided(sums: Any) -> Any:
    return sums


def clip_by_tensor_norm(
    max_norm: float, totals: Totals = _undivided
) -> optax.GradientTransformation:
    """Clips each tensor by its own norm; each layer or block of a stack counts as one tensor.

    The denominator includes PyTorch's 1e-6 (Stickland & Murray, code).
    """

    def square(path: Any, grad: Array) -> Array:
        stacked = any(getattr(key, "key", None) in ("layers", "blocks") for key in path)
        axes = tuple(range(int(stacked), grad.ndim))
        return jnp.sum(jnp.square(grad), axes, keepdims=True)

    def clip(grad: Array, square: Array) -> Array:
        return grad * jnp.minimum(1.0, max_norm / (jnp.sqrt(square) + 1e-6))

    def update(
        grads: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> Any:
        del params
        squares = totals(jax.tree_util.tree_map_with_path(square, grads))
        return jax.tree.map(clip, grads, squares), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def clip_by_global_norm(
    max_norm: float, totals: Totals = _undivided
) -> optax.GradientTransformation:
    """Clips all tensors by their common norm, as `optax.clip_by_global_norm` does."""

    def update(
        grads: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> Any:
        del params
        norm = global_norm(grads, totals)
        return jax.tree.map(
            lambda x: jnp.where(norm < max_norm, x, (x / norm) * max_norm), grads
        ), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def global_norm(tree: optax.Updates, totals: Totals = _undivided) -> Array:
    """The norm of all leaves together, float32."""
    squares = totals(jax.tree.map(lambda x: jnp.sum(jnp.square(x)), tree))
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam without bias correction, as BERT was trained; optax's own always corrects."""

    def init(params: optax.Params) -> tuple[optax.Params, optax.Params]:
        # Two allocations: donated buffers must not alias.
        return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

    def update(
        grads: optax.Updates,
        state: tuple[optax.Params, optax.Params],
        params: optax.Params | None = None,
    ) -> Any:
        del params
        mu = optax.tree.update_moment(grads, state[0], b1, 1)
        nu = optax.tree.update_moment(grads, state[1], b2, 2)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), (mu, nu)

    return optax.GradientTransformation(init, update)


def decays(params: optax.Params) -> optax.Params:
    """The mask of leaves with weight decay: all but biases, layer norms and scaling factors.

    The bias of an encoder-decoder's logits has no gradient, and so stays as it is.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale", "logits_bias"), params
    )


def moves_idle_tasks(config: ConfigDict) -> bool:
    """Whether the optimiser of `config` moves tasks that a step did not draw."""
    return bool(config.name == "bert_n_pals")


def make_optimizer(
    config: ConfigDict, num_tasks: int, total_steps: int, totals: Totals = _undivided
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The optimiser that `config` (`config.optimizer` of an experiment) describes.

    Args:
        config: see above.
        num_tasks: T.
        total_steps: the number of steps of the schedule.
        totals: the devices' `Division.totals`, where weights are divided.

    Returns:
        The transformation, with an update that takes `drawn` (see `per_task`), and the learning
        rate schedule.

    Raises:
        UserError: if the optimiser or the schedule is unknown.
    """
    if config.schedule not in LEARNING_RATE_SCHEDULES:
        raise UserError(
            f"unknown optimizer.schedule {config.schedule!r}; known are"
            f" {', '.join(LEARNING_RATE_SCHEDULES)}."
        )
    schedule = LEARNING_RATE_SCHEDULES[config.schedule](
        config.learning_rate, config.warmup, total_steps
    )
    decay = optax.add_decayed_weights(config.weight_decay, decays)
    scale = optax.scale_by_learning_rate(schedule)
    if config.name == "adamw":
        adam = optax.chain(optax.scale_by_adam(config.b1, config.b2, config.eps), decay)
        tasks = per_task(adam, num_tasks, idle_drift=moves_idle_tasks(config))
        return optax.chain(clip_by_global_norm(config.clip, totals), tasks, scale), schedule
    if config.name == "bert_n_pals":
        # Exactly the original's optimiser. The schedule is inside `per_task` because there every
        # tensor counts its own steps, from its first gradient on.
        adam = scale_by_uncorrected_adam(config.b1, config.b2, config.eps)
        inner = optax.chain(clip_by_tensor_norm(config.clip, totals), adam, decay, scale)
        return per_task(inner, num_tasks, idle_drift=moves_idle_tasks(config)), schedule
    raise UserError(f"unknown optimizer.name {config.name!r}; known are adamw, bert_n_pals.")
