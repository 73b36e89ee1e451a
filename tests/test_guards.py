"""The checks during training: compilations and divergence."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pals_jax.data.batch import Batch
from pals_jax.data.sampler import Draw
from pals_jax.data.tasks import known_task
from pals_jax.runtime.errors import UserError
from pals_jax.training.guards import CompilationGuard, CompilationWarning, check_finite


def batch(length: int) -> Batch:
    return tiny.batch([0, 0], rows=2).replace(input_ids=np.zeros((2, length), np.int32))


def test_the_first_compilation_of_each_shape_is_right() -> None:
    with CompilationGuard(jax.jit(lambda state, batch: state + batch.input_ids.sum())) as guard:
        for length in (3, 4, 3, 4):
            guard(jnp.float32(0), batch(length))
            jax.jit(lambda x: x * 2)(np.zeros(length))  # what others compile is theirs
    assert guard.count == 2


def test_any_other_is_reported() -> None:
    """Here the state changes its dtype under way, which a step must never do."""
    with CompilationGuard(jax.jit(lambda state, batch: state + batch.input_ids.sum())) as guard:
        guard(jnp.float32(0), batch(3))
        with pytest.warns(
            CompilationWarning, match=r"again for a batch of a known shape, \(2, 3\)"
        ):
            guard(jnp.int32(0), batch(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            guard(jnp.int32(0), batch(3))


def test_divergence_names_the_step_the_task_and_the_examples() -> None:
    tasks = [known_task("rte"), known_task("cola")]
    draw = {
        5: Draw(np.array([1], np.int32), np.array([[7, 8]])),
        6: Draw(np.array([0, 1], np.int32), np.array([[3], [4]])),
    }
    fine = {"loss": np.array([0.1, 0.2]), "grad_norm": np.array([1.0, 2.0])}
    check_finite(5, fine, draw.__getitem__, tasks)
    for bad, message in (
        ({"loss": np.array([0.1, np.nan])}, "in step 7 the loss is nan.*rte: 3; cola: 4"),
        ({"grad_norm": np.array([np.inf, 1.0])}, "in step 6 .* norm inf.*from 0: cola: 7, 8[)]"),
        ({"loss": np.array([3e4, 0.1])}, "in step 6 the loss is 3e[+]04"),
    ):
        with pytest.raises(UserError, match=message):
            check_finite(5, fine | bad, draw.__getitem__, tasks)
