"""Properties of every method of the catalogue, each at a size that fits the tiny encoder."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Param
from pals_jax.models.adapters.parse import parse_method
from pals_jax.models.adapters.spec import Adapter, TaskCopy
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

ARRAYS = tuple(tiny.inputs().values())


def test_the_tiny_methods_are_all() -> None:
    """Nothing that the catalogue offers goes untested here."""
    tested = {text.split(",")[0] for text in tiny.METHODS}
    assert tested == set(methods.METHODS) - {"shared"}
    together = [name for names in tiny.TOGETHER for name in names.split(" + ")]
    assert sorted(together) == sorted(tiny.METHODS)


@cache
def compiled(name: str) -> tuple[MultiTaskModel, Any, Any]:
    model = tiny.model(tiny.METHODS[name])
    return model, tiny.variables(model), jax.jit(model.apply)


def test_mixed_batches_equal_single_tasks() -> None:
    """A scalar, one id for each row, and one for each group; every method: test_packing.py."""
    _, variables, apply = compiled("pals")
    single = [apply(variables, *ARRAYS, task) for task in range(3)]
    assert apply._cache_size() == 1  # One compilation serves all tasks.
    assert not np.allclose(single[0][:, :1], single[1][:, :1], atol=1e-2)
    for task_ids in ([2, 0, 1, 2], [1, 2]):
        mixed = apply(variables, *ARRAYS, np.array(task_ids))
        # As one array: a task of one output may have a logit near zero, which is no scale.
        tasks = np.repeat(task_ids, 4 // len(task_ids))
        expected = np.stack([single[task][row] for row, task in enumerate(tasks)])
        tiny.assert_rounded_alike(mixed, expected)


def test_training_a_task_moves_its_own_rows_only() -> None:
    """With a frozen encoder: every parameter of the task, and nothing else, bit for bit.

    The rows of every method: test_packing.py.
    """
    step, state = tiny.training(tiny.model(tiny.METHODS["pals"]), ("adapters/",))
    state, _ = step(state, tiny.batch([1] * 4))  # At step 0 the learning rate is 0.
    after, _ = step(state, tiny.batch([1] * 4))
    tiny.assert_same(after.variables["params"], state.variables["params"])
    for path, leaf in flatten_dict(after.variables["adapters"], sep="/").items():
        before = flatten_dict(state.variables["adapters"], sep="/")[path]
        np.testing.assert_array_equal(leaf[0], before[0], err_msg=path)
        np.testing.assert_array_equal(leaf[2], before[2], err_msg=path)
        assert (leaf[1] != before[1]).any(), path


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.TOGETHER)
def test_other_sizes(name: str) -> None:
    """Two heads, two layers, one task, and thirty: the task axis is no part of the arithmetic."""
    one = MultiTaskModel(
        tiny.config(num_attention_heads=2, num_hidden_layers=2), (3,), tiny.TOGETHER[name]
    )
    many = one.clone(num_outputs=(3,) * 30)
    variables = tiny.variables(many)
    row = jax.tree.map(lambda x: x[17:18], variables["adapters"])
    ids, types, mask = (x[:, :5] for x in ARRAYS)
    alone = jax.jit(one.apply)(variables | {"adapters": row}, ids, types, mask, 0)
    among = jax.jit(many.apply)(variables, ids, types, mask, 17)
    tiny.assert_rounded_alike(among, alone)


def test_a_new_method_takes_no_change_elsewhere() -> None:
    """Squeezing one number out of the heads, through form, model, counts and training."""

    @dataclasses.dataclass(frozen=True)
    class Sum:
        def parameters(self, inputs: int, outputs: int, config: Any) -> Any:
            return {"weight": Param((outputs,))}

        def __call__(self, params: Any, x: Any, context: Any) -> Any:
            return x.sum(-1, keepdims=True) * params["weight"].reshape(1, 1, -1)

    model = tiny.model((Adapter("sum", "attention.heads", Sum(), reads="state"),))
    step, state = tiny.training(model, ("adapters/",))
    for _ in range(2):
        before, (state, _) = state, step(state, tiny.batch([0] * 4))
    weight = (x.variables["adapters"]["sum"]["layers"]["weight"] for x in (before, state))
    was, now = map(np.asarray, weight)
    assert now.shape == (3, 3, 12)
    assert (now[0] != was[0]).all()
    np.testing.assert_array_equal(now[1:], was[1:])


@pytest.mark.slow
def test_layers_can_be_switched_off() -> None:
    """One compilation for every span; with none active the adapters are as if absent."""
    _, variables, apply = compiled("houlsby_plus_pals")
    bare = tiny.model(())
    without = {"params": variables["params"], "adapters": {"head": variables["adapters"]["head"]}}
    whole = apply(variables, *ARRAYS, 0)
    before = apply._cache_size()
    outputs = [apply(variables, *ARRAYS, 0, np.array(on)) for on in np.eye(3, dtype=bool)]
    assert apply._cache_size() == before + 1
    tiny.assert_rounded_alike(
        apply(variables, *ARRAYS, 0, np.zeros(3, bool)), bare.apply(without, *ARRAYS, 0)
    )
    tiny.assert_rounded_alike(apply(variables, *ARRAYS, 0, np.ones(3, bool)), whole)
    only = tiny.model(
        tuple(dataclasses.replace(a, layers=(1,)) for a in tiny.METHODS["houlsby_plus_pals"])
    )
    rows = jax.tree.map(lambda x: x, variables["adapters"])
    for name in ("attention_adapter", "pal"):
        rows[name] = rows[name] | {
            "layers": jax.tree.map(lambda x: x[:, 1:2], rows[name]["layers"])
        }
    expected = only.apply({"params": variables["params"], "adapters": rows}, *ARRAYS, 0)
    tiny.assert_rounded_alike(outputs[1], expected)


# Initial values


@pytest.mark.slow
@pytest.mark.parametrize("name", ["houlsby", "lora", "ia3", "lhuc", "layer_norms", "bitfit"])
def test_untrained_methods_are_nearly_the_identity(minilm: Any, name: str) -> None:
    """On real weights; adapters of Houlsby et al. by less than 1e-3, the others exactly or so."""
    from pals_jax.convert import from_huggingface

    method = methods.METHODS[name]()
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (2, 12), dtype=np.int32)
    arrays = ids, np.zeros_like(ids), np.ones_like(ids)
    hidden = []
    for adapters in ((), method):
        model, variables = from_huggingface(minilm, adapters=adapters, tasks=(2, 3))
        hidden.append(
            jax.jit(model.apply, static_argnames="method")(variables, *arrays, 1, method="encode")
        )
    change = float(jnp.abs(hidden[1] - hidden[0]).max())
    assert change < (1e-3 if name == "houlsby" else 1e-5)


@pytest.mark.slow
def test_copies_begin_as_the_encoder(minilm: Any) -> None:
    from pals_jax.convert import from_huggingface

    _, variables = from_huggingface(minilm, adapters=methods.top_layers(2), tasks=(2, 2))
    layers = variables["params"]["encoder"]["layers"]["ffn"]["output"]["kernel"]
    mine = variables["adapters"]["top_layers"]["layers"]["ffn"]["output"]["kernel"]
    np.testing.assert_array_equal(mine, np.stack([layers[-2:]] * 2))


# Collisions


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("pals + pals", "two parts named 'pal'"),
        ("houlsby + pfeiffer", "two parts named 'ffn_adapter'"),
        ("houlsby + bitfit", "'layer_norms' and 'biases' collide at .*norm/bias"),
        ("top_layers(count=1) + layer_norms", "'top_layers' and 'layer_norms' collide"),
    ],
)
def test_parts_that_collide(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.variables(tiny.model(parse_method(expression)))


def test_two_that_replace_or_gate_one_state_collide() -> None:
    twice = (*methods.top_layer(), dataclasses.replace(methods.top_dense()[0], name="other"))
    with pytest.raises(UserError, match="'top' and 'other' collide at top"):
        tiny.variables(tiny.model(twice))
    prefix = methods.prefix_tuning(2, 0)[0]
    with pytest.raises(UserError, match=r"'prefix' and 'other' collide at attention.heads"):
        tiny.variables(tiny.model((prefix, dataclasses.replace(prefix, name="other"))))
    owned = (TaskCopy("first", "layers/", (0,)), TaskCopy("second", "layers/", (1, 2)))
    tiny.variables(tiny.model(owned))  # side by side
