"""The training step: the trained part, the loss of mixed batches, and a step's dependencies."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
import scipy.special
import tiny
from flax.traverse_util import flatten_dict

from pals_jax.experiment.optim import make_optimizer
from pals_jax.inference.steps import make_eval_step
from pals_jax.models.adapters.bound import overlay
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError
from pals_jax.training.losses import example_losses
from pals_jax.training.step import create_state, make_train_step, partition

MODEL = MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS, tiny.METHODS["pals"])


# What is trained


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        (["adapters/"], lambda path: path[0] == "adapters"),
        (["params/", "adapters/"], lambda path: True),
        (["params/encoder/pooler"], lambda path: path[2] == "pooler"),
        ([r".*norm/", "adapters/"], lambda path: path[0] == "adapters" or "norm" in path[-2]),
    ],
)
def test_partition_puts_every_leaf_on_exactly_one_side(rules: list[str], trained: Any) -> None:
    variables = tiny.variables(MODEL)
    trainable, frozen = (flatten_dict(side) for side in partition(variables, rules))
    leaves = flatten_dict(variables)
    assert trainable.keys() | frozen.keys() == leaves.keys()
    assert not trainable.keys() & frozen.keys()
    assert trainable.keys() == {path for path in leaves if trained(path)}
    tiny.assert_same(overlay(*partition(variables, rules)), variables)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["adapters/", "params/decoder"], "'params/decoder' in trainable matches no parameter"),
        (["head"], "'head' in trainable"),  # A rule matches from the beginning of the path.
        ([], "trainable is empty"),
    ],
)
def test_partition_refuses(rules: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        partition(tiny.variables(MODEL), rules)


@pytest.mark.parametrize("name", ["adamw", "bert_n_pals"])
@pytest.mark.parametrize("rules", [("adapters/",), ("params/",), ("params/encoder/pooler",)])
def test_frozen_parameters_own_no_optimiser_state(name: str, rules: tuple[str, ...]) -> None:
    optimizer, _ = make_optimizer(tiny.optimizer_config(name), 3, tiny.TOTAL_STEPS)
    state = create_state(tiny.variables(MODEL), rules, optimizer)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == np.float32]
    trained = jax.tree.leaves(state.trainable)
    assert sorted(x.shape for x in moments) == sorted([x.shape for x in trained] * 2)


@pytest.mark.parametrize(("trained", "still"), [("adapters", "params"), ("params", "adapters")])
def test_what_is_frozen_stays_bit_for_bit(trained: str, still: str) -> None:
    model = MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS, tiny.METHODS["low_rank"])
    step, state = tiny.training(model, (f"{trained}/",))
    before = state.variables
    for _ in range(3):
        state, _ = step(state, tiny.batch([0, 1, 2, 0]))
    assert int(state.step) == 3
    tiny.assert_same(state.variables[still], before[still])
    assert all(tiny.moved(before[trained], state.variables[trained]))


# The loss


def test_example_losses_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4, 3)).astype(np.float32)
    logits[[1, 3], 1:] = logits[2, 2] = np.finfo(np.float32).min
    targets = np.array([2, 7.7, 1, -1.3], np.float32)  # 7 is no class
    is_regression = np.array([False, True, False, True])
    entropy = -scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    expected = [
        entropy[0, 2],
        (logits[1, 0] - 7.7) ** 2,
        entropy[2, 1],
        (logits[3, 0] + 1.3) ** 2,
    ]
    losses = example_losses(logits, targets, is_regression)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    gradients = jax.grad(lambda x: example_losses(x, targets, is_regression).sum())(logits)
    assert np.isfinite(gradients).all()
    assert not gradients[logits == np.finfo(np.float32).min].any()


def loss_and_gradients(batch: Any) -> tuple[float, Any]:
    step, state = tiny.pals_training()
    state, metrics = step(state, batch)
    return float(metrics["loss"]), jax.device_get(state.opt_state[1])


def test_a_mixed_batch_is_the_weighted_mean_of_single_tasks() -> None:
    weights = np.array([1, 2, 0.5, 1], np.float32)
    task_ids = np.array([0, 1, 2, 0])
    mixed, gradients = loss_and_gradients(tiny.batch(task_ids).replace(weights=weights[:, None]))
    singles = []
    for task in range(3):
        own = np.where(task_ids == task, weights, 0)
        singles.append(loss_and_gradients(tiny.batch([task] * 4).replace(weights=own[:, None])))
    shares = [weights[task_ids == task].sum() / weights.sum() for task in range(3)]
    losses = [loss for loss, _ in singles]
    assert len({round(loss, 3) for loss in losses}) == 3
    assert mixed == pytest.approx(np.dot(shares, losses), rel=1e-6)
    expected = jax.tree.map(
        lambda *grads: sum(share * grad for share, grad in zip(shares, grads, strict=True)),
        *(grads for _, grads in singles),
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # noqa: E731
    jax.tree.map(close, gradients, expected)


def without_key_biases(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All leaves but those of key biases; and those, whose gradients are mere rounding noise.

    A key bias adds the same to all scores of a query, which the softmax does not see.
    """
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}
    noise = {path: x for path, x in leaves.items() if "['key']['bias']" in path}
    return {path: x for path, x in leaves.items() if path not in noise}, noise


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "bert_n_pals"])
def test_slots_may_be_in_any_order(name: str) -> None:
    """A batch without slots has one for each task, in the tasks' order."""
    optimizer, _ = make_optimizer(tiny.optimizer_config(name), 3, tiny.TOTAL_STEPS)
    batch = tiny.batch([2, 0, 2, 2])
    told = batch.replace(slot_tasks=np.array([2, 1, 0], np.int32))
    start = create_state(tiny.variables(MODEL), ["params/", "adapters/"], optimizer)
    step = jax.jit(make_train_step(MODEL, optimizer, seed=0))
    (signal, noise), (expected, other) = map(
        without_key_biases, (step(start, told), step(start, batch))
    )
    tiny.assert_rounded_alike(signal, expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-7), noise, other)


def test_rows_without_weight_do_not_matter() -> None:
    weights = np.array([[1], [1], [0], [0]], np.float32)
    one = tiny.batch([0, 1, 2, 0], seed=1).replace(weights=weights)
    other = tiny.batch([0, 1, 1, 2], seed=2).replace(weights=weights)
    other = jax.tree.map(lambda a, b: np.concatenate([a[:2], b[2:]]), one, other)
    loss, gradients = loss_and_gradients(one)
    other_loss, other_gradients = loss_and_gradients(other)
    assert loss == other_loss
    tiny.assert_rounded_alike(gradients, other_gradients)
    kept = loss_and_gradients(one.replace(weights=np.array([[1], [0], [0], [0]], np.float32)))[0]
    assert loss != pytest.approx(kept)


def test_grad_norm_is_that_of_all_gradients_before_clipping() -> None:
    step, state = tiny.pals_training()
    state, metrics = step(state, tiny.batch([0, 1, 2, 0]))
    norm = optax.tree.norm(jax.device_get(state.opt_state[1]))
    assert norm > 1.0  # the bound of clipping
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


# What a step depends on


def test_one_compilation_serves_all_tasks() -> None:
    step, state = tiny.pals_training()
    for task in range(3):
        state, _ = step(state, tiny.batch([task] * 4))
    assert step._cache_size() == 1


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step() -> None:
    model = MultiTaskModel(tiny.config(hidden_dropout_prob=0.5), tiny.NUM_OUTPUTS)
    optimizer, _ = make_optimizer(tiny.optimizer_config(), 3, tiny.TOTAL_STEPS)
    state = create_state(tiny.variables(model), ["adapters/head"], optimizer)
    batch = tiny.batch([0, 1, 2, 0])

    def losses(seed: int) -> list[float]:
        step = jax.jit(make_train_step(model, optimizer, seed))
        steps = (0, 0, 7)
        return [float(step(state.replace(step=np.int32(i)), batch)[1]["loss"]) for i in steps]

    first, again, later = losses(0)
    assert first == again
    assert first != pytest.approx(later)
    assert losses(1)[0] != pytest.approx(first)


def test_the_evaluation_step_gives_logits_without_dropout() -> None:
    model = MultiTaskModel(tiny.config(hidden_dropout_prob=0.5), tiny.NUM_OUTPUTS)
    still = MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS)
    variables = tiny.variables(model)
    logits, expected = (
        jax.jit(make_eval_step(m))((variables, None), tiny.batch([0, 1, 2, 0]))
        for m in (model, still)
    )
    assert logits.shape == (4, 1, 3)
    np.testing.assert_array_equal(logits, expected)
