"""One step of generation equals the decoder on the whole text, for every method.

The search: `test_generation`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import SEQ2SEQ_TOGETHER as TOGETHER

from pals_jax.models import kv_cache
from pals_jax.models.adapters import methods
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.stack import unstacked

ROWS, VARIANTS, LENGTH = 3, 2, 5
BEGIN = 2  # where in the cache a text begins; it goes on at the front
METHODS = {name: x for name, x in tiny.METHODS.items() if name not in tiny.OF_POOLERS}


def stepped(model: Seq2SeqModel, variables: Any, ids: Any, mask: Any, targets: Any) -> Any:
    """The decoder's last hidden states [B, L, D], position by position.

    The variants of a text have one source, and one task.
    """
    apply = jax.jit(model.apply, static_argnames="method")
    layers, tasks = unstacked(variables["params"]["decoder"]["layers"]), np.array([2, 0, 1])
    rows = slice(None, None, VARIANTS)
    sources = apply(variables, layers, ids[rows], mask[rows], tasks, method="read")
    of_variant = np.arange(VARIANTS)[:, None, None] == np.arange(VARIANTS)

    def step(position: int, entries: Any) -> Any:
        seen = np.zeros(LENGTH, bool)
        seen[(BEGIN + np.arange(position)) % LENGTH] = True
        visible = (of_variant & seen[:, None]).reshape(VARIANTS, -1)
        tokens = targets[:, position].reshape(ROWS, VARIANTS)
        of_rows = np.full(ROWS, position), np.broadcast_to(visible, (ROWS, *visible.shape))
        inputs = variables, layers, tokens, *of_rows, sources, entries, tasks
        return lambda: apply(*inputs, method="step")

    entries = kv_cache.empty(jax.eval_shape(step(0, None))[1], LENGTH * VARIANTS)
    hidden = []
    for position in range(LENGTH):
        h, left = step(position, entries)()
        entries = kv_cache.write(entries, left, (BEGIN + position) % LENGTH * VARIANTS)
        hidden.append(h.reshape(ROWS * VARIANTS, -1))
    return jnp.stack(hidden, axis=1)


def assert_steps(model: Seq2SeqModel) -> None:
    texts, variables = tiny.texts(rows=ROWS * VARIANTS), tiny.variables(model)
    ids, mask = (np.repeat(texts[k][:ROWS], VARIANTS, 0) for k in ("input_ids", "attention_mask"))
    targets, tasks = texts["decoder_input_ids"], np.repeat([2, 0, 1], VARIANTS)
    arrays = ids, mask, targets, np.ones_like(targets), tasks
    whole = jax.jit(lambda v: model.apply(v, *arrays, method="decode"))(variables)
    bound = 1e-5 * max(1.0, float(np.abs(whole).max()))
    steps = stepped(model, variables, ids, mask, targets)
    np.testing.assert_allclose(steps, whole, rtol=0, atol=bound)


def test_steps_equal_the_whole_text() -> None:
    assert_steps(tiny.seq2seq(METHODS["pals"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_steps_with_every_method(name: str) -> None:
    assert_steps(tiny.seq2seq(TOGETHER[name]))


@pytest.mark.nightly
@pytest.mark.parametrize("name", METHODS)
def test_steps_with_each_method(name: str) -> None:
    assert_steps(tiny.seq2seq(METHODS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mbart", "marian"])
def test_steps_of_other_architectures(model_type: str) -> None:
    method = METHODS["houlsby_plus_pals"] + METHODS["prefix_tuning"] + METHODS["prompt_tuning"]
    assert_steps(tiny.seq2seq(method, model_type=model_type))


@pytest.mark.slow
def test_steps_of_layers_that_carry_different_adapters() -> None:
    method = methods.pals(6, 3, layers="final_half") + methods.top_layers(1)
    assert_steps(tiny.seq2seq(method))
