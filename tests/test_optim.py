"""The optimiser: the treatment of tasks that a step did not draw, and the published details."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from pals_jax.experiment.optim import (
    bert_schedule,
    clip_by_tensor_norm,
    decays,
    linear_schedule,
    make_optimizer,
    scale_by_uncorrected_adam,
)
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

TASKS = 3


def random_tree(seed: int) -> Any:
    """A tree in the shape of `variables`: shared leaves, and leaves that lead with tasks."""
    rng = np.random.default_rng(seed)
    shapes = {
        "params": {"dense": {"kernel": (4, 2), "bias": (2,)}, "norm": {"scale": (4,)}},
        "adapters": {
            "a": {"layers": {"up": {"kernel": (TASKS, 2, 3, 4), "bias": (TASKS, 2, 4)}}},
            "head": {"kernel": (TASKS, 4, 2), "bias": (TASKS, 2)},
        },
    }
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def gradients(seed: int, drawn: list[int]) -> Any:
    """Random gradients, zero in the rows of the tasks that are not drawn."""
    tree = random_tree(seed)
    here = np.isin(np.arange(TASKS), drawn)
    keep = lambda x: jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), x, 0)  # noqa: E731
    return tree | {"adapters": jax.tree.map(keep, tree["adapters"])}


def run(draws: list[list[int]], **config: Any) -> list[tuple[Any, Any]]:
    """(parameters, state) at the start and after each step, which draws the tasks of `draws`."""
    optimizer, _ = make_optimizer(tiny.optimizer_config(**config), TASKS, tiny.TOTAL_STEPS)

    @jax.jit
    def step(grads, state, params, drawn):
        updates, state = optimizer.update(grads, state, params, drawn=drawn)
        return optax.apply_updates(params, updates), state

    params = random_tree(0)
    history = [(params, optimizer.init(params))]
    for i, tasks in enumerate(draws):
        params, state = history[-1]
        drawn = np.isin(np.arange(TASKS), tasks)
        history.append(step(gradients(i + 1, tasks), state, params, drawn))
    return jax.device_get(history)


def task_state(state: Any, task: int) -> Any:
    """A task's rows of everything in an optimiser's state that leads with a task axis."""
    per_task = [x.tasks for x in jax.tree.leaves(state, is_leaf=is_per_task) if is_per_task(x)]
    assert len(per_task) == 1
    return tiny.rows(per_task[0], task)


def is_per_task(x: Any) -> bool:
    return hasattr(x, "started")


# The default: idle tasks are still


def test_idle_tasks_stay_bit_for_bit() -> None:
    draws = [[0], [1], [0, 1], [1], [0]]
    history = run(draws, weight_decay=0.1)
    for drawn, (params, state), (later, later_state) in zip(
        draws, history, history[1:], strict=False
    ):
        for task in range(TASKS):
            own, new = (tiny.rows(x["adapters"], task) for x in (params, later))
            moments, new_moments = (task_state(x, task) for x in (state, later_state))
            if task in drawn:
                assert all(tiny.moved(moments, new_moments))
            else:
                tiny.assert_same(new, own)
                tiny.assert_same(new_moments, moments)
    assert all(tiny.moved(history[0][0]["params"], history[-1][0]["params"]))
    tiny.assert_same(*(tiny.rows(history[i][0]["adapters"], 2) for i in (0, -1)))


def test_a_task_whose_rows_are_all_left_out_is_idle() -> None:
    """As the filling of an uneven last batch is."""
    step, state = tiny.pals_training()
    for _ in range(2):  # At step 0 the learning rate is 0.
        state, _ = step(state, tiny.batch([1, 1, 2, 2]))
    weights = np.array([[1], [1], [0], [0]], np.float32)
    after, _ = step(state, tiny.batch([1, 1, 2, 2]).replace(weights=weights))
    rows = [tiny.rows(x.variables["adapters"], 2) for x in (state, after)]
    tiny.assert_same(*rows)
    moments = [tiny.rows(x.opt_state[0][1].tasks, 2) for x in (state, after)]
    tiny.assert_same(*moments)
    assert all(tiny.moved(*(tiny.rows(x.variables["adapters"]["pal"], 1) for x in (state, after))))


def test_each_task_counts_its_own_steps() -> None:
    _, state = run([[0], [1], [0, 1], [0]])[-1]
    counts = [x for x in jax.tree.leaves(state) if x.dtype == np.int32]
    assert any(np.array_equal(x, [3, 2, 0]) for x in counts)
    per_task = next(x for x in jax.tree.leaves(state, is_leaf=is_per_task) if is_per_task(x))
    np.testing.assert_array_equal(per_task.started, [True, True, False])


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_sees_plain_adamw_over_its_own_steps(task: int) -> None:
    draws = [[0], [1], [0, 1], [1], [0], [2]]
    # Without clipping, which looks at all tasks; the learning rate goes by the run's own step.
    config = tiny.optimizer_config(clip=1e9, weight_decay=0.1)
    history = run(draws, **config)
    own_steps = [i for i, drawn in enumerate(draws) if task in drawn]
    rates = bert_schedule(config.learning_rate, config.warmup, tiny.TOTAL_STEPS)
    adamw = optax.adamw(
        lambda count: rates(jnp.array(own_steps)[count]),
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    params = tiny.rows(random_tree(0)["adapters"], task)
    state = adamw.init(params)
    for i in own_steps:
        grads = tiny.rows(gradients(i + 1, draws[i])["adapters"], task)
        updates, state = adamw.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)  # noqa: E731
    jax.tree.map(close, tiny.rows(history[-1][0]["adapters"], task), params)


def test_adamw_clips_by_the_norm_of_all_gradients() -> None:
    """Adam forgets a common factor, so look at the moments: the first is (1 - b1) * clipped."""
    _, state = run([[0, 1]], clip=0.5, b1=0.9)[1]
    norm = optax.tree.norm(gradients(1, [0, 1]))
    per_task = next(x for x in jax.tree.leaves(state, is_leaf=is_per_task) if is_per_task(x))
    expected = 0.1 * gradients(1, [0, 1])["params"]["dense"]["kernel"] * 0.5 / norm
    mu = per_task.shared[0].mu["params"]["dense"]["kernel"]
    np.testing.assert_allclose(mu, expected, rtol=1e-5)


# The reproduction preset


def test_idle_tasks_of_the_original_drift_from_their_first_gradient_on() -> None:
    history = run([[0], [0], [1], [0], [0]], name="bert_n_pals")
    rows = [[tiny.rows(params["adapters"], task) for params, _ in history] for task in range(3)]
    for step in range(2):  # Not drawn yet: untouched.
        tiny.assert_same(rows[1][step], rows[1][step + 1])
    tiny.assert_same(rows[1][2], rows[1][3])  # A task's own warm-up starts at a rate of 0.
    for step in (3, 4):  # Drawn before and now idle: momentum and decay go on.
        assert all(tiny.moved(rows[1][step], rows[1][step + 1]))
    assert all(tiny.moved(rows[0][2], rows[0][3]))
    tiny.assert_same(rows[2][0], rows[2][-1])


def test_drift_is_a_step_with_a_zero_gradient() -> None:
    """One kernel of one task by hand: two steps with a gradient, then two without."""
    config = tiny.optimizer_config("bert_n_pals")
    history = run([[0], [0], [1], [2]], **config)
    schedule = bert_schedule(config.learning_rate, config.warmup, tiny.TOTAL_STEPS)
    w = np.asarray(random_tree(0)["adapters"]["head"]["kernel"][0], np.float64)
    m = v = np.zeros_like(w)
    for i in range(4):
        g = np.zeros_like(w)
        if i < 2:
            g = np.asarray(random_tree(i + 1)["adapters"]["head"]["kernel"][0], np.float64)
            g = g * min(1, 1 / (np.linalg.norm(g) + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - float(schedule(i)) * (m / (np.sqrt(v) + 1e-6) + 0.01 * w)
        actual = history[i + 1][0]["adapters"]["head"]["kernel"][0]
        np.testing.assert_allclose(actual, w, rtol=0, atol=1e-6)


def test_clipping_by_tensor_looks_at_each_layer_alone() -> None:
    kernel = np.zeros((2, 3, 4), np.float32)
    kernel[0, 0, :2] = 3, 4  # A norm of 5 in the first layer, of 0.5 in the second.
    kernel[1, 0, :2] = 0.3, 0.4
    tree = {"layers": {"kernel": kernel}, "pooler": {"kernel": kernel}}
    clip = clip_by_tensor_norm(1.0)
    clipped, _ = clip.update(jax.tree.map(jnp.asarray, tree), clip.init(tree))
    np.testing.assert_allclose(clipped["layers"]["kernel"][0], kernel[0] / 5, rtol=1e-6)
    np.testing.assert_array_equal(clipped["layers"]["kernel"][1], kernel[1])
    whole = np.linalg.norm(kernel)
    np.testing.assert_allclose(clipped["pooler"]["kernel"], kernel / whole, rtol=1e-6)


def test_uncorrected_adam() -> None:
    adam = scale_by_uncorrected_adam(0.9, 0.999, 1e-6)
    grads = {"w": jnp.array([2.0, -0.5])}
    updates, state = adam.update(grads, adam.init(grads))
    # With bias correction the first update would be the sign of the gradient.
    sign = np.sign(grads["w"]) * 0.1 / np.sqrt(0.001)
    np.testing.assert_allclose(updates["w"], sign, rtol=1e-4)
    updates, _ = adam.update({"w": jnp.zeros(2)}, state)
    np.testing.assert_allclose(updates["w"], 0.9 * sign / np.sqrt(0.999), rtol=1e-4)


# Schedules, decay, refusals


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (bert_schedule, 0, 0.0),
        (bert_schedule, 50, 0.5),
        (bert_schedule, 99, 0.99),
        (bert_schedule, 100, 0.9),  # It drops from the peak to 1 - warmup of it.
        (bert_schedule, 500, 0.5),
        (bert_schedule, 1000, 0.0),
        (bert_schedule, 1200, 0.0),
        (linear_schedule, 0, 0.0),
        (linear_schedule, 50, 0.5),
        (linear_schedule, 100, 1.0),
        (linear_schedule, 550, 0.5),
        (linear_schedule, 1000, 0.0),
        (linear_schedule, 1200, 0.0),
    ],
)
def test_schedules(schedule: Any, step: int, expected: float) -> None:
    rate = schedule(2e-5, 0.1, 1000)(jnp.int32(step))
    np.testing.assert_allclose(rate, 2e-5 * expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("schedule", [bert_schedule, linear_schedule])
def test_schedules_without_warm_up_start_at_the_peak(schedule: Any) -> None:
    assert float(schedule(2e-5, 0.0, 1000)(jnp.int32(0))) == pytest.approx(2e-5)


def test_weight_decay_spares_biases_and_layer_norms() -> None:
    variables = tiny.variables(MultiTaskModel(tiny.config(), (2,), tiny.METHODS["pals"]))
    leaves, _ = jax.tree_util.tree_flatten_with_path(decays(variables))
    names = {True: set(), False: set()}
    for path, decayed in leaves:
        names[decayed].add(path[-1].key)
    assert names == {True: {"kernel", "embedding"}, False: {"bias", "scale"}}


def test_weight_decay_follows_its_mask() -> None:
    """Against a run without decay, from a step with a rate above 0: only kernels differ."""
    ours, none = (run([[0], [0]], weight_decay=decay)[-1][0] for decay in (0.1, 0.0))
    rate = 1e-3 * 0.1 / 0.3  # of the second step
    kernel = random_tree(0)["params"]["dense"]["kernel"]
    np.testing.assert_allclose(
        ours["params"]["dense"]["kernel"] - none["params"]["dense"]["kernel"],
        -rate * 0.1 * kernel,
        rtol=0,
        atol=1e-6,
    )
    np.testing.assert_array_equal(ours["params"]["dense"]["bias"], none["params"]["dense"]["bias"])
    scale = ("params", "norm", "scale")
    np.testing.assert_array_equal(*(x[scale[0]][scale[1]][scale[2]] for x in (ours, none)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sgd"}, "optimizer.name 'sgd'; known are adamw, bert_n_pals"),
        ({"schedule": "cosine"}, "optimizer.schedule 'cosine'; known are bert, linear"),
    ],
)
def test_unknown_names(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(tiny.optimizer_config(**change), TASKS, 10)
