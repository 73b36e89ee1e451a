"""One step of generation equals the decoder on the whole text, for every method.

The search: `test_generation`.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pals_jax.models import kv_cache
from pals_jax.models.adapters import methods
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.stack import unstacked

ROWS, VARIANTS, LENGTH = 3, 2, 5
BEGIN = 2  # where in the cache a text begins; it goes on at the front
METHODS = {name: method for name, method in tiny.METHODS.items() if name not in tiny.OF_POOLERS}


@cache
def compiled(model: Seq2SeqModel) -> Any:
    return jax.jit(lambda *inputs: (model.apply(*inputs, method="decode"), stepped(model, *inputs)))


def stepped(
    model: Seq2SeqModel, variables: Any, ids: Any, mask: Any, targets: Any, _: Any, tasks: Any
) -> Any:
    """The decoder's last hidden states [B, L, D], position by position; two variants at a time."""
    layers = unstacked(variables["params"]["decoder"]["layers"])
    rows = slice(None, None, VARIANTS)  # variants of a text have one source, and one task
    tasks = tasks[rows]
    sources = model.apply(variables, layers, ids[rows], mask[rows], tasks, method="read")
    entries, hidden = None, []  # at first there is no cache yet
    of_variant = np.arange(VARIANTS)[:, None, None] == np.arange(VARIANTS)
    for position in range(LENGTH):
        seen = np.zeros(LENGTH, bool)
        seen[(BEGIN + np.arange(position)) % LENGTH] = True
        visible = (of_variant & seen[:, None]).reshape(VARIANTS, -1)
        h, left = model.apply(
            variables,
            layers,
            targets[:, position].reshape(ROWS, VARIANTS),
            jnp.full(ROWS, position),
            jnp.broadcast_to(visible, (ROWS, *visible.shape)),
            sources,
            entries,
            tasks,
            method="step",
        )
        if entries is None:
            entries = kv_cache.empty(left, LENGTH * VARIANTS)
        entries = kv_cache.write(entries, left, (BEGIN + position) % LENGTH * VARIANTS)
        hidden.append(h.reshape(ROWS * VARIANTS, -1))
    return jnp.stack(hidden, axis=1)


def assert_steps(model: Seq2SeqModel) -> None:
    texts = tiny.texts(rows=ROWS * VARIANTS)
    ids, mask = (np.repeat(texts[k][:ROWS], VARIANTS, 0) for k in ("input_ids", "attention_mask"))
    targets = texts["decoder_input_ids"]
    tasks = np.repeat([2, 0, 1], VARIANTS)
    arrays = ids, mask, targets, np.ones_like(targets), tasks
    whole, steps = compiled(model)(tiny.variables(model), *arrays)
    bound = 1e-5 * max(1.0, float(np.abs(whole).max()))
    np.testing.assert_allclose(steps, whole, rtol=0, atol=bound)


@pytest.mark.parametrize("name", tiny.mostly_slow(METHODS, "mam"))
def test_steps_equal_the_whole_text(name: str) -> None:
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
