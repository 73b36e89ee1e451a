"""Parity with the original PyTorch code of He et al. on BART and mBART, for all their methods.

The golden files hold that code's outputs and gradients on small random models (shared/golden/
unified_view_seq2seq/README.md).
"""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pals_jax.convert import from_unified_view, tables, to_unified_view
from pals_jax.convert import unified_view_seq2seq as unified_view
from pals_jax.data.pairs import PairTokenizer
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck, Prefix
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.bart import BartConfig
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import UserError
from pals_jax.training.losses import token_losses


def prefix(form: Prefix, compose: Any = "add") -> Method:
    return (
        Adapter("prefix", "attention.heads", form, shared=("embedding", "down"), compose=compose),
    )


def attention_adapter(site: str, reads: Any) -> Method:
    return (Adapter("attention_adapter", site, Bottleneck(5, "relu", norm=True), reads),)


def ffn_adapter(reads: Any, scale: Any, **options: Any) -> Method:
    form = Bottleneck(7, "relu", **options)
    return (Adapter("ffn_adapter", "ffn.output", form, reads, scale=scale),)


# Each variant as a method. BART's multi-head parallel adapter is not mBART's.
SEQUENTIAL = attention_adapter("attention.projection", "state")
MH_PARALLEL = {
    "bart": prefix(Prefix(5, 10, "relu", norm=True, scaled=False)),
    "mbart": prefix(Prefix(5, 10, "relu")),
}
METHODS: dict[str, Method] = {
    "plain": (),
    "prefix": methods.prefix_tuning(5, 10),
    "prefix_flat": methods.prefix_tuning(5, 0),
    "prefix_gated": methods.prefix_tuning(5, 10),
    "prefix_ungated": methods.prefix_tuning(5, 10, gated=False),
    "prefix_ungated_ln": prefix(Prefix(5, 10, norm=True)),
    "attn_parallel": attention_adapter("attention.heads", "block_input"),
    "attn_sequential": SEQUENTIAL,
    "ffn_parallel": methods.parallel(7),
    "ffn_scaled_parallel": methods.scaled_parallel(7),
    "ffn_learned_scale": methods.parallel(7, scale="learned"),
    "ffn_sequential": methods.adapter(7),
    "ffn_pfeiffer": methods.pfeiffer(7),
    "ffn_ln_in": ffn_adapter("state", 2.0, norm=True),
    "ffn_ln_out": ffn_adapter("block_input", 1.0, out_norm=2.0),
    "houlsby": SEQUENTIAL + methods.adapter(7),
    "lora_attn": methods.lora(5, 12),
    "lora_ffn": methods.lora(7, 12, ("ffn_in", "ffn_out")),
    "mam": methods.prefix_tuning(5, 10) + methods.scaled_parallel(7),
    "prompt_tuning": methods.prompt_tuning(5),
}
ON_MBART = (
    *("plain", "prefix", "mh_parallel", "attn_parallel", "attn_sequential", "ffn_scaled_parallel"),
    *("ffn_sequential", "ffn_pfeiffer", "lora_attn", "mam", "prompt_tuning"),
)
VARIANTS = [f"bart/{name}" for name in (*METHODS, "mh_parallel") if name != "ffn_pfeiffer"]
VARIANTS += [f"mbart/{name}" for name in ON_MBART]


def load(shared: Path, variant: str) -> SimpleNamespace:
    """The config, the state dict, the prefix module, and the file itself."""
    with np.load(shared / "golden" / "unified_view_seq2seq" / f"{variant}.npz") as file:
        arrays = dict(file)
    return SimpleNamespace(
        config=json.loads(arrays["config"].tobytes()),
        state_dict=under("param/", arrays),
        prefix_state=under("prefix/", arrays),
        arrays=arrays,
    )


def under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def convert(golden: SimpleNamespace, **options: Any) -> Any:
    return from_unified_view(golden.config | options, golden.state_dict, golden.prefix_state)


@pytest.fixture(scope="module", params=tiny.mostly_slow(VARIANTS, "bart/mam"))
def golden(request: pytest.FixtureRequest, shared: Path) -> SimpleNamespace:
    """One variant's file with the model and variables converted from it, and what they give."""
    golden = load(shared, request.param)
    golden.variant = request.param
    golden.model, golden.variables = convert(golden)
    golden.outputs = outputs(golden)
    return golden


def outputs(golden: SimpleNamespace) -> SimpleNamespace:
    """Hidden states, logits, losses, and the gradients of both losses."""
    names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
    ids, mask, decoder_ids, labels = (golden.arrays[k].astype(np.int32) for k in names)
    model, counted = golden.model, labels != -100
    said = np.where(counted, labels, 0)

    def losses(variables: Any) -> Any:
        texts = ids, mask, decoder_ids, np.ones_like(decoder_ids)  # no decoder mask in training
        hidden = model.apply(variables, *texts, 0, method="decode")
        logits = model.apply(variables, hidden, method="logits")
        both = (token_losses(logits, said, smoothing) for smoothing in (0.0, 0.1))
        loss, smoothed = (jnp.sum(x * counted) / counted.sum() for x in both)
        encoded = model.apply(variables, ids, mask, 0, method="encode")
        return (loss, smoothed), (encoded, hidden, logits)

    @jax.jit
    def with_gradients(variables: Any) -> Any:
        values, pull, rest = jax.vjp(losses, variables, has_aux=True)
        of_loss, of_smoothed = (pull(cotangents)[0] for cotangents in ((1.0, 0.0), (0.0, 1.0)))
        return values, of_loss, of_smoothed, rest

    values, gradients, smoothed_gradients, rest = with_gradients(golden.variables)
    loss, smoothed = values
    encoded, hidden, logits = rest
    return SimpleNamespace(
        encoder_last_hidden_state=encoded,
        decoder_last_hidden_state=hidden,
        logits=logits,
        loss=loss,
        label_smoothed_loss=smoothed,
        gradients=gradients,
        smoothed_gradients=smoothed_gradients,
    )


def assert_close(actual: Any, desired: np.ndarray, name: str = "") -> None:
    """1e-5 at unit scale; logits and some gradients are larger, and so is their rounding."""
    bound = 1e-5 * max(1.0, float(np.abs(desired).max()))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=bound, err_msg=name)


def test_every_file_is_a_variant(shared: Path) -> None:
    folder = shared / "golden" / "unified_view_seq2seq"
    files = {str(file.relative_to(folder).with_suffix("")) for file in folder.glob("*/*.npz")}
    assert files == set(VARIANTS)


def test_method(golden: SimpleNamespace) -> None:
    model_type, name = golden.variant.split("/")
    expected = MH_PARALLEL[model_type] if name == "mh_parallel" else METHODS[name]
    assert golden.model.method == expected


def test_outputs(golden: SimpleNamespace) -> None:
    real = golden.arrays["attention_mask"] > 0
    # With prompts, the original has them first.
    encoded = golden.arrays["encoder_last_hidden_state"][:, -real.shape[1] :]
    assert_close(golden.outputs.encoder_last_hidden_state[real], encoded[real])
    for name in ("decoder_last_hidden_state", "logits", "loss", "label_smoothed_loss"):
        assert_close(getattr(golden.outputs, name), golden.arrays[name], name)


WITH_EVERY_LAYER = [f"{model}/{name}" for model in ("bart", "mbart") for name in ("plain", "mam")]


@pytest.mark.slow
@pytest.mark.parametrize("variant", WITH_EVERY_LAYER)
def test_every_layer(variant: str, shared: Path) -> None:
    """Its output is that of a model whose last layer it is, behind the final norm of mBART."""
    golden = load(shared, variant)
    model, variables = convert(golden)
    ids, mask, decoder_ids = (
        golden.arrays[k].astype(np.int32)
        for k in ("input_ids", "attention_mask", "decoder_input_ids")
    )
    texts = ids, mask, decoder_ids, np.ones_like(decoder_ids)
    for block, method, given in (
        ("encoder", "encode", texts[:2]),
        ("decoder", "decode", texts),
    ):
        hidden = golden.arrays[f"{block}_hidden_states"]
        real = mask > 0 if block == "encoder" else np.ones_like(decoder_ids) > 0
        for depth in range(len(hidden)):
            config = dataclasses.replace(model.config, **{f"{block}_layers": depth})
            lower = Seq2SeqModel(config, model.num_tasks, model.method)
            found = lower.apply(lowest(variables, block, depth), *given, 0, method=method)
            expected = hidden[depth]
            if model.config.model_type == "mbart" and depth < len(hidden) - 1:
                expected = normalised(expected, variables["params"][block]["norm"])
            assert_close(found[real], expected[real], f"{block} {depth}")


def lowest(variables: Any, block: str, depth: int) -> Any:
    """The variables with the lowest layers of a block alone."""

    def cut(path: Any, leaf: Any) -> Any:
        collection, name, *rest = (key.key for key in path)
        of_block = "decoder" if name.startswith("decoder") else "encoder"
        if name == "vocabulary" or of_block != block or "layers" not in rest:
            return leaf
        return leaf[:depth] if collection == "params" else leaf[:, :depth]

    return jax.tree_util.tree_map_with_path(cut, variables)


def normalised(x: np.ndarray, norm: Any) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.asarray(norm["scale"]) + np.asarray(norm["bias"])


def test_gradients(golden: SimpleNamespace) -> None:
    """Of everything that the original trains; what it trains without effect is not held."""
    assert_same_gradients(golden, golden.outputs.gradients, "grad")
    if any(name.startswith("grad_label_smoothed/") for name in golden.arrays):
        assert_same_gradients(golden, golden.outputs.smoothed_gradients, "grad_label_smoothed")


def assert_same_gradients(golden: SimpleNamespace, gradients: Any, key: str) -> None:
    ours = tables.write(gradients, unified_view.slots(golden.model))
    theirs = {
        f"prefix/{name}" if name in golden.prefix_state else name: golden.arrays[f"{key}/{name}"]
        for name in golden.config["trainable"]
    }
    theirs = unified_view.cut(theirs, golden.model.config)
    unused = {name for name in theirs if name not in ours}
    assert all(not theirs[name].any() for name in unused)
    held = theirs.keys() - unused
    assert held
    for name in held:
        assert_close(ours[name], theirs[name], name)


def test_targets_are_shifted_as_in_the_original(golden: SimpleNamespace) -> None:
    config = golden.model.config
    start = None if config.model_type == "mbart" else config.decoder_start_token_id
    tokenizer = PairTokenizer(None, config.model_type, start)
    for labels, read in zip(
        golden.arrays["labels"].tolist(), golden.arrays["decoder_input_ids"].tolist(), strict=True
    ):
        said = [label for label in labels if label != -100]
        assert tokenizer.behind_start(said)[:-1] == read[: len(said)]


def test_frozen_and_unused_are_not_trained(golden: SimpleNamespace) -> None:
    gradients = golden.outputs.gradients
    assert not gradients["params"]["vocabulary"]["logits_bias"].any()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients["adapters"]):
        assert leaf.any(), path


def test_round_trip_is_exact(golden: SimpleNamespace) -> None:
    state_dict, prefix_state = to_unified_view(golden.model, golden.variables)
    ours = state_dict | {f"prefix/{k}": v for k, v in prefix_state.items()}
    theirs = golden.state_dict | {f"prefix/{k}": v for k, v in golden.prefix_state.items()}
    no_gradient = {re.sub(r"^(?=decoder_)", "prefix/", k) for k in golden.config["no_gradient"]}
    assert ours.keys() == theirs.keys() - no_gradient
    depth, used = golden.model.config.encoder_layers, golden.model.config.decoder_layers
    for name, tensor in ours.items():
        expected = theirs[name].copy()
        if re.match(r"prefix/control_trans2?\.2\.", name):  # rows of layers that are not there
            expected[len(expected) // depth * used :] = 0
        np.testing.assert_array_equal(tensor, expected, err_msg=name)
    model, variables = from_unified_view(golden.config, state_dict, prefix_state)
    assert model == golden.model
    tiny.assert_same(variables, golden.variables)


def test_bitfit_is_a_copy_of_every_bias(shared: Path) -> None:
    golden = load(shared, "bart/plain")
    model, variables = convert(golden, attn_mode="bitfit", ffn_mode="bitfit")
    assert model.method == methods.bitfit()
    count = 0
    for block, name in (("encoder", "biases"), ("decoder", "decoder.biases")):
        mine = jax.tree.map(lambda x: x[0], variables["adapters"][name])
        for path, leaf in jax.tree_util.tree_leaves_with_path(mine):
            of_model = variables["params"][block]
            for key in path:
                of_model = of_model[key.key]
            np.testing.assert_array_equal(leaf, of_model)
            count += len(leaf) if path[0].key == "layers" else 1
    assert count == 57  # tensors that the original trains


# Refusals


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("bart/prefix", {"attn_option": "cross_attn", "attn_composition": "gate_add"}, "gate_add"),
        ("bart/attn_parallel", {"attn_option": "none"}, "'adapter' and attn_option 'none'"),
        ("bart/ffn_parallel", {"ffn_option": "pfeiffer"}, "ffn_option 'pfeiffer'"),
        ("bart/ffn_parallel", {"ffn_adapter_layernorm_option": "both"}, "layernorm_option 'both'"),
        ("bart/ffn_ln_out", {"ffn_adapter_scalar": "learnable_scalar"}, "scalar 'learned'"),
        ("mbart/mam", {"ffn_mode": "mh_adapter"}, "ffn_mode 'mh_adapter'"),
    ],
)
def test_options_that_are_not_held(
    shared: Path, variant: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        convert(load(shared, variant), **options)
    assert message in str(error.value)


def test_every_ill_fitting_tensor_is_listed(shared: Path) -> None:
    golden = load(shared, "bart/mam")
    del golden.state_dict["model.decoder.layers.1.fc1.bias"]
    golden.state_dict["lm_head.weight"] = golden.state_dict["lm_head.weight"] + 1
    golden.state_dict["model.decoder.layers.0.ef_ffn_adapter.scale"] = np.ones(1, np.float32)
    golden.prefix_state["control_trans2.2.weight"] = np.zeros((72, 11), np.float32)
    with pytest.raises(UserError) as error:
        convert(golden)
    message = str(error.value)
    assert "missing model.decoder.layers.1.fc1.bias" in message
    assert "lm_head.weight differs from another copy of the same matrix" in message
    assert "unused model.decoder.layers.0.ef_ffn_adapter.scale" in message
    assert "prefix/control_trans2.2.weight[1] is (24, 11) and not (24, 10)" in message
    assert message.count(";") == 4


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (methods.pals(6, 3), "pal"),
        (methods.bitfit(), "biases"),
        (methods.parallel(5, site="attention"), "attention_adapter"),  # without a layer norm
        (methods.lora(2, targets=("ffn_in",), alpha=3.0) + methods.lhuc(), "lhuc"),
        ((Adapter("one", "ffn.output", Bottleneck(5, "relu"), layers=(-1,)),), "one"),
        (methods.parallel(5, activation="gelu"), "ffn_adapter"),
        (methods.lora(2, targets=("query", "key")), "lora_key"),
        (methods.multi_head_parallel(5) + methods.lora(2), "lora_value"),
    ],
)
def test_what_the_original_cannot_hold(method: Method, name: str) -> None:
    model = Seq2SeqModel(tiny.bart_config(), method=method)
    with pytest.raises(UserError, match=f"cannot hold '{name}'"):
        to_unified_view(model, tiny.variables(model))


@pytest.mark.parametrize(
    "model", [Seq2SeqModel(BartConfig(model_type="marian")), Seq2SeqModel(BartConfig(), 2)]
)
def test_only_one_task_on_bart_or_mbart_goes_out(model: Seq2SeqModel) -> None:
    with pytest.raises(UserError, match="only one task, on a BART or mBART"):
        to_unified_view(model, {})
