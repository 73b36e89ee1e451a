"""Adapters compared with a plain NumPy encoder; the task axis, with one task at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from pals_jax.models.adapters import methods
from pals_jax.models.adapters import spec as adapters_lib
from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.forms import Bottleneck, Context, Param, ProjectedAttention
from pals_jax.models.adapters.spec import READS, Adapter
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.segments import make_segments
from pals_jax.models.transformer import SITES
from pals_jax.runtime.errors import UserError

INPUTS = tiny.inputs()
ARRAYS = tuple(INPUTS.values())


# The reference: the same arithmetic in float64 NumPy, a loop over layers, one task, no task axis.


def dense(p: Any, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def norm(p: Any, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def behind(p: Any, residual: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda y: norm(p, residual + y)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * scipy.special.ndtr(x)


def attend(query, key, value, mask: np.ndarray, heads: int) -> np.ndarray:
    """All [B, L, D] but mask, bool [B, L]."""
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    scores = np.einsum("bqhk,bshk->bhqs", query, key) / np.sqrt(query.shape[-1])
    weights = scipy.special.softmax(np.where(mask[:, None, None], scores, -np.inf), axis=-1)
    return np.einsum("bhqs,bshk->bqhk", weights, value).reshape(*query.shape[:2], -1)


def form(adapter: Adapter, p: Any, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The delta of either form."""
    z = dense(p["down"], x)
    if isinstance(adapter.form, Bottleneck):
        act = {"identity": lambda x: x, "relu": lambda x: np.maximum(x, 0), "gelu": gelu}
        return dense(p["up"], act[adapter.form.activation](z))
    query, key, value = (dense(p[name], z) for name in ("query", "key", "value"))
    return gelu(dense(p["up"], attend(query, key, value, mask, adapter.form.heads)))


def reference(model: MultiTaskModel, variables: Any, task: int) -> np.ndarray:
    """The last hidden states of INPUTS."""
    config = model.config
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    encoder, adapter_params = variables["params"]["encoder"], tiny.rows(variables["adapters"], task)
    mask = INPUTS["attention_mask"] > 0

    layer = None  # inside the loop over layers its index

    def at(site: str, state: np.ndarray, block_input: np.ndarray, normalise=None) -> np.ndarray:
        for adapter in model.method:
            carriers = adapter.layer_indices(config.num_hidden_layers)
            if adapter.site != site or (layer is not None and layer not in carriers):
                continue
            params = adapter_params[adapter.name].get("shared", {})
            if layer is not None:
                params |= tiny.rows(
                    adapter_params[adapter.name].get("layers", {}), carriers.index(layer)
                )
            x = block_input if adapter.reads == "block_input" else state
            x = normalise(x) if adapter.reads == "normalised" else x
            state = state + form(adapter, params, x, mask)
        return state

    table = {name: p.get("embedding") for name, p in encoder["embeddings"].items()}
    h = table["word"][INPUTS["input_ids"]] + table["token_type"][INPUTS["token_type_ids"]]
    h = norm(encoder["embeddings"]["norm"], h + table["position"][: h.shape[1]])
    h = at("embeddings", h, h)
    for layer in range(config.num_hidden_layers):
        p = tiny.rows(encoder["layers"], layer)
        attention, ffn = p["attention"], p["ffn"]
        query, key, value = (
            at(f"attention.{name}", dense(attention[name], h), h)
            for name in ("query", "key", "value")
        )
        z = attend(query, key, value, mask, config.num_attention_heads)
        z = at("attention.heads", z, h)
        y = at("attention.projection", dense(attention["output"], z), z)
        y = at("attention.output", y, h, behind(p["attention_norm"], h))
        a = norm(p["attention_norm"], h + y)
        z = gelu(at("ffn.intermediate", dense(ffn["intermediate"], a), a))
        z = at("ffn.hidden", z, a)
        y = at("ffn.projection", dense(ffn["output"], z), z)
        y = at("ffn.output", y, a, behind(p["ffn_norm"], a))
        h = at("layer.output", norm(p["ffn_norm"], at("layer", a + y, h)), h)
    layer = None
    return at("top", h, h)


def check_against_reference(model: MultiTaskModel, task: int = 1) -> None:
    variables = tiny.variables(model)
    with jax.disable_jit():  # Ten times as fast as compiling; the golden files test what compiles.
        actual = model.apply(variables, *ARRAYS, task, method="encode")
    expected = reference(model, variables, task)
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reads", READS[:2])
@pytest.mark.parametrize(
    "site", tiny.mostly_slow(SITES, "embeddings", "attention.heads", "ffn.output", "layer", "top")
)
def test_each_site_in_parallel_and_serially(site: str, reads: Any) -> None:
    adapter = Adapter("a", site, Bottleneck(5, "relu"), reads=reads, layers=(1,))
    check_against_reference(tiny.model((adapter,), num_hidden_layers=2))


@pytest.mark.parametrize("site", ["attention.output", "ffn.output"])
def test_reading_behind_the_layer_norm(site: str) -> None:
    adapter = Adapter("a", site, Bottleneck(5, "relu"), reads="normalised")
    check_against_reference(tiny.model((adapter,), num_hidden_layers=2))


@pytest.mark.parametrize(
    "layers", tiny.mostly_slow(["all", "first_half", "final_half", (0, 2)], "all", (0, 2))
)
@pytest.mark.parametrize("shared", [True, False])
def test_pals(layers: Any, shared: bool) -> None:
    check_against_reference(tiny.model(methods.pals(6, heads=3, layers=layers, shared=shared)))


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_low_rank(activation: str) -> None:
    check_against_reference(tiny.model(methods.low_rank(5, activation)))


@pytest.mark.slow
def test_several_adapters_are_applied_in_their_order() -> None:
    parallel = Adapter("parallel", "ffn.output", Bottleneck(4, "relu"), layers="first_half")
    serial = Adapter("serial", "ffn.output", Bottleneck(3), reads="state")
    pal = Adapter("pal", "layer", ProjectedAttention(6, 2), layers=(2, 1), shared=("down",))
    check_against_reference(tiny.model((parallel, serial, pal)))


@pytest.mark.slow
def test_projected_attention_drops_attention_weights() -> None:
    adapted = ProjectedAttention(6, 3)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda param: rng.normal(size=param.shape).astype(np.float32),
        adapted.parameters(12, 12, tiny.config()),
        is_leaf=lambda x: isinstance(x, Param),
    )
    x = rng.normal(size=(2, 7, 12)).astype(np.float32)
    salts = jnp.arange(4, dtype=jnp.uint32).reshape(2, 1, 2)
    rows = make_segments(jnp.ones((2, 7), int), jnp.zeros((2, 1), int), salts)
    config = tiny.config(attention_probs_dropout_prob=0.5)
    off = adapted(params, x, Context(config, rows))
    on, again, other = (
        adapted(params, x, Context(config, rows, jax.random.key(seed))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(on, again)
    assert not np.allclose(on, off, atol=1e-2)
    assert not np.allclose(on, other, atol=1e-2)
    np.testing.assert_array_equal(
        off, adapted(params, x, Context(tiny.config(), rows, jax.random.key(0)))
    )


@pytest.mark.slow
def test_every_adapter_of_every_layer_has_a_dropout_key_of_its_own() -> None:
    probe = tiny.Probe()
    model = tiny.model(tuple(Adapter(site, site, probe) for site in ("ffn.output", "layer")))
    variables = tiny.variables(model)
    model.apply(variables, *ARRAYS, np.array([0, 1]), rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()
    keys = {tuple(key.tolist()) for _, key in probe.seen}
    assert len(keys) == 2 * model.config.num_hidden_layers
    assert len(probe.seen) == 4 * len(keys)  # 4 rows, which salts tell apart
    model.apply(variables, *ARRAYS, 0)
    jax.effects_barrier()
    assert probe.seen[-1][1] is None


# Layers and spans


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("first_half", 4, (0, 1)),
        ("final_half", 4, (2, 3)),
        ("first_half", 5, (0, 1)),
        ("final_half", 5, (3, 4)),
        ((4, 0, 4), 5, (0, 4)),
        ((-1, 4, -3), 5, (2, 4)),
    ],
)
def test_layer_indices(layers: Any, depth: int, expected: tuple[int, ...]) -> None:
    assert methods.pals(layers=layers)[0].layer_indices(depth) == expected


@pytest.mark.parametrize("layers", ["top_half", (0, 3), (-4,), ()])
def test_layers_that_do_not_exist(layers: Any) -> None:
    model = tiny.model(methods.low_rank(5, layers=layers))
    with pytest.raises(UserError, match="layers="):
        tiny.variables(model)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], [(0, 6)]),
        (["all"], [(0, 6)]),
        (["first_half"], [(0, 3), (3, 6)]),
        (["all", "final_half"], [(0, 3), (3, 6)]),
        ([(0, 2, 3)], [(0, 1), (1, 2), (2, 4), (4, 6)]),
        (["first_half", (2, 3)], [(0, 2), (2, 3), (3, 4), (4, 6)]),
    ],
)
def test_spans(layers: list[Any], expected: list[tuple[int, int]]) -> None:
    adapters = tuple(
        Adapter(str(i), "layer", Bottleneck(2), layers=where) for i, where in enumerate(layers)
    )
    config = tiny.config(num_hidden_layers=6)
    assert list(TaskAdapters(adapters, {}, config).spans()) == expected


def test_adapter_refuses() -> None:
    with pytest.raises(UserError, match=r"no site 'attention' .* sites are .*ffn.output"):
        Adapter("a", "attention", Bottleneck(2))
    with pytest.raises(UserError, match="Bottleneck has no gate"):
        Adapter("a", "layer", Bottleneck(2), compose="gate")
    with pytest.raises(UserError, match="no layer norm behind"):
        Adapter("a", "attention.query", Bottleneck(2), reads="normalised")
    with pytest.raises(UserError, match="at the embeddings only, not at layer"):
        Adapter("a", "layer", Bottleneck(2), compose="concat")
    model = tiny.model((Adapter("a", "layer", Bottleneck(2), shared=("query",)),))
    with pytest.raises(UserError, match=r"shares \['query'\].*\['down', 'up'\]"):
        tiny.variables(model)


# The task axis


def shapes(method: methods.Method) -> Any:
    return jax.tree.map(jnp.shape, tiny.variables(tiny.model(method))["adapters"])


def projections(lead: tuple[int, ...], **sizes: tuple[int, int]) -> Any:
    """Shapes of kernels and biases behind the axes `lead`."""
    return {name: {"kernel": (*lead, i, o), "bias": (*lead, o)} for name, (i, o) in sizes.items()}


def test_parameters_lead_with_tasks_then_layers() -> None:
    head = projections((3,), head=(12, 3))
    small = dict.fromkeys(("query", "key", "value"), (6, 6))
    large = {"down": (12, 6), "up": (6, 12)}
    pals, unshared, low_rank = list(tiny.METHODS.values())[:3]
    assert shapes(()) == head
    assert shapes(pals) == head | {
        "pal": {"shared": projections((3,), **large), "layers": projections((3, 3), **small)}
    }
    assert shapes(unshared) == head | {"pal": {"layers": projections((3, 3), **small, **large)}}
    half = methods.low_rank(5, layers="final_half")
    assert shapes(half) == head | {
        "low_rank": {"layers": projections((3, 1), down=(12, 5), up=(5, 12))}
    }
    assert shapes(low_rank)["low_rank"]["layers"]["down"]["bias"] == (3, 3, 5)


def test_outputs_beyond_those_of_the_task_are_masked() -> None:
    model = tiny.model(())
    logits = jax.jit(model.apply)(tiny.variables(model), *ARRAYS, np.array([0, 1, 2, 0]))
    lowest = np.finfo(np.float32).min
    exists = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_array_equal(logits == lowest, ~exists)
    assert (np.abs(logits[exists]) < 100).all()


@pytest.mark.parametrize("task_ids", [3, -1, [0, 1, 2, 3], [0, -1]])
def test_a_task_id_out_of_range_is_refused(task_ids: Any) -> None:
    model = tiny.model(())
    variables = tiny.variables(model)
    with pytest.raises(UserError, match=r"task id (3|-1) is out of range.* 0 to 2"):
        model.apply(variables, *ARRAYS, np.array(task_ids))


def test_a_traced_task_id_out_of_range_gives_nan() -> None:
    model = tiny.model(tiny.METHODS["pals"])
    logits = jax.jit(model.apply)(tiny.variables(model), *ARRAYS, np.array([0, 3, -1, 2]))
    np.testing.assert_array_equal(np.isnan(logits[:, 0]), [False, True, True, False])


def test_shapes_that_do_not_fit() -> None:
    model = tiny.model(())
    variables = tiny.variables(model)
    for task_ids in (np.zeros(3, int), np.zeros((2, 2), int)):
        with pytest.raises(ValueError, match="cannot be dealt to 4 rows"):
            model.apply(variables, *ARRAYS, task_ids)
    long = np.ones((1, 10), np.int32)
    with pytest.raises(UserError, match=r"length 10 is above .* table of 9"):
        model.apply(variables, long, long, long, 0)


# Initial values


def test_initial_values() -> None:
    """N(0, .02) and zero, drawn for each task and layer, whatever the number of tasks."""
    config = tiny.config(hidden_size=60)
    stacks = methods.low_rank(50)[0].parameters(config)["layers"]["down"]
    few, many = (adapters_lib.init(jax.random.key(5), stacks, count) for count in (2, 4))
    tiny.assert_same(few, jax.tree.map(lambda x: np.asarray(x)[:2], many))

    kernel = np.asarray(few["kernel"])  # [T, n, D, S]
    assert kernel.dtype == np.float32
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert len({part.tobytes() for part in kernel.reshape(6, -1)}) == 6
    assert not few["bias"].any()


# Training


@pytest.mark.slow
def test_training_on_one_task_moves_its_rows_and_the_encoder_only() -> None:
    step, state = tiny.pals_training()
    state, _ = step(state, tiny.batch([1] * 4))  # At step 0 the learning rate is 0.
    before = state.variables
    after = step(state, tiny.batch([1] * 4))[0].variables
    for task in (0, 2):
        tiny.assert_same(*(tiny.rows(x["adapters"], task) for x in (before, after)))
    assert all(tiny.moved(*(tiny.rows(x["adapters"]["pal"], 1) for x in (before, after))))
    assert all(tiny.moved(before["params"], after["params"]))


@pytest.mark.slow
def test_padded_outputs_get_no_gradient() -> None:
    step, state = tiny.pals_training()
    _, gradients = step(state, tiny.batch([0, 1, 2, 0]))[0].opt_state
    head = gradients["adapters"]["head"]
    exists = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)  # [T, C]
    np.testing.assert_array_equal(head["bias"] != 0, exists)
    np.testing.assert_array_equal((head["kernel"] != 0).all(1), exists)
    assert not (head["kernel"] * ~exists[:, None]).any()
