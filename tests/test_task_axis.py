"""Adding, removing and re-ordering tasks between steps does not change the others, bit for bit."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pals_jax.data.batch import Batch
from pals_jax.experiment.optim import make_optimizer, map_tasks, moves_idle_tasks
from pals_jax.models import task_axis
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.runtime.errors import UserError
from pals_jax.training.step import TrainState, create_state, make_train_step

METHOD = tiny.METHODS["low_rank"]
TWO, FIVE = (1, 2), (1, 2, 3, 2, 1)  # numbers of outputs; the heads of five are wider


class Training:
    """Tasks trained by the real step and optimiser, on a frozen encoder."""

    def __init__(self, name: str, num_outputs: tuple[int, ...]):
        self.model = MultiTaskModel(tiny.config(num_hidden_layers=1), num_outputs, METHOD)
        self.config = tiny.optimizer_config(name, learning_rate=0.01, clip=0.2)
        self.optimizer, _ = make_optimizer(self.config, len(num_outputs), tiny.TOTAL_STEPS)
        moves_idle = moves_idle_tasks(self.config)
        self.step = jax.jit(
            make_train_step(self.model, self.optimizer, seed=0, moves_idle_tasks=moves_idle)
        )
        self.apply = jax.jit(self.model.apply)

    def batch(self, drawn: tuple[int, int], seed: int) -> Batch:
        """Says which tasks have slots as the trainer's batches do."""
        batch, every = tiny.batch(drawn, seed=seed), np.arange(len(self.model.num_outputs))
        if len(every) <= 2:
            return batch
        slot_tasks = np.append(np.unique(drawn), np.setdiff1d(every, drawn))[:2]
        return batch.replace(slot_tasks=slot_tasks.astype(np.int32))

    def start(self) -> TrainState:
        variables = jax.jit(lambda: init_variables(self.model, jax.random.key(0)))()
        return create_state(variables, ("adapters/",), self.optimizer)

    def run(self, state: TrainState, *draws: tuple[int, int]) -> TrainState:
        """A step for each pair of tasks; its examples depend on the number of the step only."""
        for drawn in draws:
            state, _ = self.step(state, self.batch(drawn, seed=int(state.step)))
        return state

    def logits(self, state: TrainState, task: int) -> np.ndarray:
        logits = self.apply(state.variables, **tiny.inputs(), task_ids=task)
        return np.asarray(logits[:, : self.model.num_outputs[task]])


training = cache(Training)


def change(edit: Any, state: TrainState, *others: TrainState) -> TrainState:
    """`edit` of what belongs to tasks: parameters, and the optimiser's state of them."""
    return state.replace(
        trainable={"adapters": edit(*(x.trainable["adapters"] for x in (state, *others)))},
        opt_state=map_tasks(edit, state.opt_state, *(x.opt_state for x in others)),
    )


def of_task(own: Training, state: TrainState, task: int) -> list[Any]:
    """Parameters, moments and step counts of one task, and the logits that it gives."""
    outputs = own.model.num_outputs[task]
    held: list[Any] = [own.logits(state, task)]

    def unpadded(path: Any, x: np.ndarray) -> np.ndarray:
        return x[..., :outputs] if "'head'" in jax.tree_util.keystr(path) else x

    def look(tree: Any) -> Any:
        held.append(jax.tree_util.tree_map_with_path(unpadded, tiny.rows(tree, task)))
        return tree

    change(look, state)
    return held


def check_kept(
    old: Training, before: TrainState, new: Training, after: TrainState, kept: dict[int, int]
) -> None:
    """The tasks `kept`, {old: new number}, are the same, and so they are after further steps.

    What is stored is the same bit for bit. Logits and further steps are of two programs, whose
    heads have other widths, and equal but for rounding.
    """
    first, second = kept
    draws = [(first, first), (second, first), (second, second), (first, second)]
    last = old.run(before, *draws)
    further = new.run(after, *((kept[a], kept[b]) for a, b in draws))
    for task, number in kept.items():
        tiny.assert_same(of_task(new, after, number)[1:], of_task(old, before, task)[1:])
        for was, now in ((before, after), (last, further)):
            tiny.assert_rounded_alike(of_task(new, now, number), of_task(old, was, task))
    for task in kept:
        assert all(tiny.moved(*(of_task(old, x, task)[:2] for x in (before, last))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "bert_n_pals"])
def test_tasks_are_appended(name: str) -> None:
    two, five = training(name, TWO), training(name, FIVE)
    state = two.run(two.start(), (0, 1), (1, 1), (0, 0))
    new = Training(name, FIVE[2:])
    params = state.frozen["params"]
    adapters = task_axis.fresh(new.model.config, FIVE[2:], METHOD, params, jax.random.key(1))
    fresh = create_state({"params": params, "adapters": adapters}, ("adapters/",), new.optimizer)
    more = change(task_axis.append, state, fresh)
    assert more.trainable["adapters"]["head"]["bias"].shape == (5, 3)
    check_kept(two, state, five, more, {0: 0, 1: 1})
    # Steps that draw the new ones teach them, from the state that they would have alone.
    tiny.assert_same(of_task(five, more, 3)[1:], of_task(new, fresh, 1)[1:])
    taught = five.run(more, (3, 4), (4, 3))
    assert all(tiny.moved(*(of_task(five, x, 4)[:2] for x in (more, taught))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_n_pals", "adamw"])
def test_tasks_are_removed_and_reordered(name: str) -> None:
    five, left = training(name, FIVE), training(name, (1, 3))
    state = five.run(five.start(), (0, 4), (3, 2), (1, 4), (3, 3))
    check_kept(
        five, state, left, change(lambda x: task_axis.take(x, FIVE, [4, 2]), state), {4: 0, 2: 1}
    )
    two, narrow = training(name, TWO), change(lambda x: task_axis.take(x, FIVE, [4, 3]), state)
    assert narrow.trainable["adapters"]["head"]["bias"].shape == (2, 2)
    for task, number in {4: 0, 3: 1}.items():
        tiny.assert_same(of_task(two, narrow, number)[1:], of_task(five, state, task)[1:])


@pytest.mark.parametrize("name", tiny.mostly_slow(["bert_n_pals", "adamw"], "adamw"))
def test_the_parts_of_a_state_are_all_of_it(name: str) -> None:
    five = training(name, FIVE)
    state = five.run(five.start(), (0, 4), (3, 2))

    def around(tree: Any) -> Any:
        return task_axis.append(*(task_axis.take(tree, FIVE, part) for part in ([0, 1], [2, 3, 4])))

    tiny.assert_same(change(around, state), state)


def test_tasks_that_do_not_exist() -> None:
    tree = {"head": {"bias": jnp.zeros((2, 3))}}
    with pytest.raises(UserError, match="task id -1 is out of range; the 2 tasks are 0 to 1"):
        task_axis.take(tree, (3, 3), [0, -1])
