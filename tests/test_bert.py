"""The encoder: scan, rematerialisation, dtypes, dropout, padding."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from pals_jax.models.adapters.spec import Adapter
from pals_jax.models.attention import dot_product_attention
from pals_jax.models.bert import BertConfig, Embeddings
from pals_jax.models.dropout import dropout
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.models.segments import make_segments, one_position
from pals_jax.models.transformer import Layer
from pals_jax.runtime.errors import UserError

INPUTS = tiny.inputs()
ARRAYS = tuple(INPUTS.values())


def make_model(**changes: Any) -> MultiTaskModel:
    return MultiTaskModel(tiny.config(**changes), tiny.NUM_OUTPUTS)


@cache
def runner(model: MultiTaskModel) -> Any:
    """The jitted `encode` of a model."""

    @jax.jit
    def run(variables, arrays, rngs):
        return model.apply(variables, *arrays, 0, method="encode", rngs=rngs)

    return run


def encode(model: MultiTaskModel, variables: Any, arrays: Any = ARRAYS, rngs: Any = None) -> Any:
    """The last hidden states."""
    return runner(model)(variables, arrays, rngs)


def test_the_scan_equals_a_loop_over_the_layers() -> None:
    model = make_model()
    variables = tiny.variables(model)
    encoder = variables["params"]["encoder"]

    @jax.jit
    def loop(encoder, ids, types, mask):
        rows = make_segments(mask, jnp.zeros((len(mask), 1), int))
        h = Embeddings(model.config).apply({"params": encoder["embeddings"]}, ids, types, rows)
        for i in range(model.config.num_hidden_layers):
            layer = {"params": jax.tree.map(lambda x, i=i: x[i], encoder["layers"])}
            h = Layer(model.config).apply(layer, h, rows)
        return h

    tiny.assert_rounded_alike(encode(model, variables), loop(encoder, *ARRAYS))


def gradients(model: MultiTaskModel, variables: Any) -> Any:
    @jax.jit
    def grads(variables):
        return jax.grad(lambda v: jnp.sum(model.apply(v, *ARRAYS, 2) ** 2))(variables)

    return grads(variables)


@pytest.mark.slow
def test_remat_gives_the_same_gradients() -> None:
    config = tiny.config()
    variables = tiny.variables(MultiTaskModel(config, (2, 1, 3)))
    plain, remat = (
        gradients(MultiTaskModel(config, (2, 1, 3), remat=remat), variables)
        for remat in (False, True)
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain)) > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, remat)


def test_remat_recomputes_the_layers() -> None:
    model = MultiTaskModel(tiny.config(), (2,), remat=True)
    program = jax.make_jaxpr(lambda v: model.apply(v, *ARRAYS, 0))(tiny.variables(model))
    assert "remat" in str(program) or "checkpoint" in str(program)


def test_bfloat16_computes_in_bfloat16_on_float32_parameters() -> None:
    config = tiny.config()
    full = MultiTaskModel(config, (2, 1, 3))
    half = MultiTaskModel(config, (2, 1, 3), dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda key: init_variables(half, key), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    variables = tiny.variables(half)
    hidden = encode(half, variables)
    assert hidden.dtype == jnp.bfloat16
    # Eight bits of mantissa, on hidden states of scale 1, through three layers.
    np.testing.assert_allclose(hidden, encode(full, variables), rtol=0, atol=0.2)
    assert np.abs(hidden - encode(full, variables)).mean() < 0.02
    logits = jax.eval_shape(lambda v: half.apply(v, *ARRAYS, 0), variables)
    assert logits.dtype == jnp.float32
    grads = jax.eval_shape(lambda v: gradients(half, v), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(["pals", "top_attention", "houlsby", "mam"], "pals")
)
def test_the_program_does_not_grow_with_depth(name: str) -> None:
    def size(depth: int) -> int:
        """Lines of the program that computes the gradients."""
        model = MultiTaskModel(tiny.config(num_hidden_layers=depth), (2,), tiny.METHODS[name])
        variables = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
        grads = jax.grad(lambda v: model.apply(v, *ARRAYS, 0).sum())
        return jax.jit(grads).lower(variables).as_text().count("\n")

    assert size(4) == size(12) > 100


def test_initial_values() -> None:
    """BERT's: kernels and tables N(0, initializer_range), drawn anew for each layer."""
    model = make_model(initializer_range=0.5, hidden_size=24, vocab_size=500)
    variables = jax.jit(lambda key: init_variables(model, key))(jax.random.key(3))
    encoder = variables["params"]["encoder"]
    words = encoder["embeddings"]["word"]["embedding"]
    kernel = encoder["layers"]["attention"]["query"]["kernel"]
    assert float(words.std()) == pytest.approx(0.5, rel=0.05)
    assert float(kernel.std()) == pytest.approx(0.5, rel=0.1)
    assert not np.allclose(kernel[0], kernel[1])
    assert not np.allclose(kernel, encoder["layers"]["attention"]["key"]["kernel"])
    assert not encoder["layers"]["ffn"]["output"]["bias"].any()
    assert (encoder["layers"]["ffn_norm"]["scale"] == 1).all()


# Dropout


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_on_exactly_where_a_key_is_passed(rate: str) -> None:
    model, still = make_model(**{rate: 0.5}), make_model()
    variables = tiny.variables(model)

    one, again, other = (
        encode(model, variables, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-2)
    off = encode(model, variables)
    np.testing.assert_array_equal(off, encode(still, variables))
    assert not np.allclose(one, off, atol=1e-2)


@pytest.mark.slow
def test_every_dropout_of_every_layer_has_a_mask_of_its_own() -> None:
    probe = tiny.Probe()
    sites = ("attention.output", "ffn.output")
    adapters = tuple(Adapter(site, site, probe, reads="state") for site in sites)
    model = MultiTaskModel(tiny.config(hidden_dropout_prob=0.5), (2,), adapters)
    variables = jax.tree.map(jnp.zeros_like, tiny.variables(model))
    layers = variables["params"]["encoder"]["layers"]
    for block in ("attention", "ffn"):  # What either block puts out before its dropout is 1.
        layers[block]["output"]["bias"] = jnp.ones_like(layers[block]["output"]["bias"])
    model.apply(variables, *ARRAYS, 0, rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()

    masks = [np.asarray(state) for state, _ in probe.seen]
    rows = len(ARRAYS[0])  # each has a mask of its own, too
    assert len(masks) == rows * len(sites) * model.config.num_hidden_layers
    for mask in masks:
        assert set(np.unique(mask)) == {0.0, 2.0}
    assert 0.45 < np.mean([mask == 0 for mask in masks]) < 0.55
    assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_dropout_keeps_the_mean() -> None:
    x = jnp.ones((1, 100, 1000))
    salts = jnp.ones((1, 1, 2), jnp.uint32)
    places = make_segments(jnp.ones((1, 100), int), jnp.zeros((1, 1), int), salts).places
    y = dropout(x, 0.1, jax.random.key(0), places)
    assert float((y == 0).mean()) == pytest.approx(0.1, abs=0.005)
    np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-6)
    assert dropout(x, 0.1, None, places) is x


# Attention and padding


def test_attention_is_that_of_jax() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 4, 7, 5)).astype(np.float32)  # [B, H, L, K]
    mask = rng.random((2, 1, 7, 7)) < 0.7
    mask[..., 0] = True
    expected = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)), mask=jnp.asarray(mask)
    )
    actual, log_normaliser = dot_product_attention(
        query, key, value, one_position()._replace(mask=mask)
    )
    np.testing.assert_allclose(actual, jnp.swapaxes(expected, 1, 2), rtol=0, atol=1e-6)
    scores = np.where(mask, query @ key.swapaxes(-1, -2) / np.sqrt(5), -np.inf)
    expected = scipy.special.logsumexp(scores, axis=-1)
    np.testing.assert_allclose(log_normaliser, expected, rtol=0, atol=1e-5)


def test_padding_does_not_reach_real_positions() -> None:
    model = make_model()
    variables = tiny.variables(model)
    ids, types, mask = ARRAYS
    real = mask > 0
    assert not real.all()
    hidden = encode(model, variables)
    noise = np.where(real, ids, (ids + 7) % 31)
    changed = encode(model, variables, (noise, np.where(real, types, 1 - types), mask))
    np.testing.assert_array_equal(hidden[real], changed[real])
    assert not np.allclose(hidden[~real], changed[~real], atol=1e-2)

    row, length = 3, int(mask[3].sum())
    cut = tuple(x[row : row + 1, :length] for x in ARRAYS)
    tiny.assert_rounded_alike(encode(model, variables, cut)[0], hidden[row, :length])


# The config


def test_config_takes_its_own_fields_only() -> None:
    config = BertConfig.from_mapping({"hidden_size": 24, "model_type": "bert", "use_cache": True})
    assert config == BertConfig(hidden_size=24)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"hidden_size": 13}, "hidden_size 13 is not a multiple of num_attention_heads 3"),
        ({"hidden_act": "silly"}, "hidden_act 'silly'"),
    ],
)
def test_config_refuses(field: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.config(**field)
