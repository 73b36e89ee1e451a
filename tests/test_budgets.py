"""Operations of a training step, counted rather than timed, against committed budgets.

`tests/budgets.json` holds the GFLOP of the matrix products of one step, counted in its jaxpr; one
compiled program shows that XLA computes no more. If a change needs more, say why in the commit that
raises the budget; if it needs less, lower the budget.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from pals_jax.data.batch import Batch
from pals_jax.experiment.optim import make_optimizer
from pals_jax.models.adapters import methods
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.training.plan import hlo
from pals_jax.training.plan.flops import of_products
from pals_jax.training.step import create_state, make_train_step

BUDGETS = json.loads(Path(__file__).with_name("budgets.json").read_text())
EVERYTHING, ADAPTERS = ("params/", "adapters/"), ("adapters/",)
ENCODER = BertConfig(
    hidden_size=384,
    num_hidden_layers=6,
    intermediate_size=1536,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
PALS = methods.pals(size=108)
STEPS: dict[str, dict[str, Any]] = {
    "shared": {"method": ()},
    "pals": {"method": PALS},
    "pals, mixed": {"method": PALS, "groups": 8},
    "pals, 64 tasks": {"method": PALS, "tasks": 64},
    "pals, 512 tasks": {"method": PALS, "tasks": 512},
    "houlsby, frozen": {"method": methods.houlsby(64), "rules": ADAPTERS},
    "pals, frozen": {"method": PALS, "rules": ADAPTERS},
    "pals in the final half, frozen": {
        "method": methods.pals(size=108, layers="final_half"),
        "rules": ADAPTERS,
    },
    "pals in the final half, frozen, begun there": {
        "method": methods.pals(size=108, layers="final_half"),
        "rules": ADAPTERS,
        "kept": True,
    },
}


@cache
def flops(name: str) -> int:
    return of_products(*step(**STEPS[name]))


def step(
    method: Any,
    rules: tuple[str, ...] = EVERYTHING,
    groups: int = 1,
    tasks: int = 8,
    kept: bool = False,
) -> tuple[Any, Any, Batch]:
    """A step of 8 rows of 128 positions, and the shapes of its arguments.

    Where what lies below the first adapter is kept, the step begins above.
    """
    model = MultiTaskModel(ENCODER, (2,) * tasks, method)
    optimizer, _ = make_optimizer(tiny.optimizer_config(), tasks, tiny.TOTAL_STEPS)

    def first_state() -> Any:
        return create_state(init_variables(model, jax.random.key(0)), rules, optimizer)

    tokens = np.zeros((8, 128), np.int32)
    numbers = np.zeros((8, 16), np.int32)
    hidden = np.zeros((8, 128, ENCODER.hidden_size), np.float32)
    batch = Batch(
        **dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), tokens),
        **dict.fromkeys(("first", "example_ids"), numbers),
        **dict.fromkeys(("targets", "weights"), numbers.astype(np.float32)),
        task_ids=np.zeros(groups, np.int32),
        # As TrainBatches has it.
        slot_tasks=np.arange(groups, dtype=np.int32) if groups < tasks else None,
        hidden=hidden if kept else None,
    )
    return make_train_step(model, optimizer, seed=0), jax.eval_shape(first_state), batch


@pytest.mark.parametrize("name", tiny.mostly_slow(STEPS, "pals"))
def test_no_step_takes_more_than_its_budget(name: str) -> None:
    budget = BUDGETS[name] * 1e9
    assert 0.97 * budget <= flops(name) <= 1.005 * budget, f"{flops(name) / 1e9:.3f} GFLOP"


@pytest.mark.slow
def test_the_compiled_step_takes_what_is_counted() -> None:
    """XLA may fold small products; it must not compute any twice."""
    pals, *arguments = step(**STEPS["pals"])
    compiled = jax.jit(pals, donate_argnums=0).lower(*arguments).compile()
    assert hlo.read(compiled.as_text()).flops == pytest.approx(flops("pals"), rel=0.03)


@pytest.mark.slow
def test_what_methods_cost_beside_each_other() -> None:
    assert flops("pals") < 1.2 * flops("shared")
    assert flops("pals, mixed") < 1.15 * flops("pals")


@pytest.mark.slow
def test_no_step_grows_with_the_number_of_tasks() -> None:
    assert flops("pals, 64 tasks") < 1.001 * flops("pals")
    assert flops("pals, 512 tasks") < 1.001 * flops("pals")


@pytest.mark.slow
def test_what_is_frozen_is_not_differentiated() -> None:
    """No gradients of its weights; and none of what lies below the first adapter."""
    assert flops("pals, frozen") < 0.75 * flops("pals")
    half = flops("pals in the final half, frozen")
    assert half < 0.75 * flops("pals, frozen")


@pytest.mark.slow
def test_what_is_kept_is_not_computed() -> None:
    """Of a half without gradients it saves the forward pass."""
    begun_there = flops("pals in the final half, frozen, begun there")
    assert begun_there < 0.75 * flops("pals in the final half, frozen")


def test_every_budget_is_used() -> None:
    assert BUDGETS.keys() == STEPS.keys()


@pytest.mark.slow
def test_all_tasks_share_what_lies_below_their_adapters() -> None:
    """Eight tasks with PALs in the final half take the first half once."""
    model = MultiTaskModel(ENCODER, (2,) * 8, methods.pals(size=108, layers="final_half"))
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    tokens = (np.zeros((8, 128), np.int32),) * 3

    def flops(apply: Any, *arguments: Any) -> float:
        return hlo.read(jax.jit(apply).lower(*arguments).compile().as_text()).flops

    every = flops(lambda v, *x: model.apply(v, *x, method="every_task"), variables, *tokens)
    one = flops(model.apply, variables, *tokens, 0)
    assert every < 0.6 * 8 * one
