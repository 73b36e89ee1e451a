"""Parity with the original PyTorch code of He et al. on RoBERTa, for all their methods.

The golden files hold that code's outputs on small random models (shared/README.md,
golden/unified_view).
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from pals_jax.convert import from_unified_view, to_unified_view
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck, Prefix
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

ROBERTA = tiny.config(model_type="roberta", pad_token_id=1)

# What the original stores without using it.
PREFIX = r"prefix/(wte_enc|wte2|control_trans_enc|control_trans2)\."
FLAT = r"prefix/(encoder_attn|decoder_cross_attn)_(key|value)\."
SECOND_COPY = r"encoder\.layer\.\d\.output\.ef_ffn_adapter\."
QUERY_NORM = r"encoder\.layer\.\d\.attention\.self\.ef_transform_layer_norm\."


def at_attention(site: str, reads: Any) -> Method:
    return (Adapter("attention_adapter", site, Bottleneck(6, "relu", norm=True), reads),)


# Each variant as a method, and what the original stores beside it without using it.
VARIANTS: dict[str, tuple[Method, str]] = {
    "prefix": (methods.prefix_tuning(6, 20), PREFIX),
    "prefix_flat": (methods.prefix_tuning(6, 0), FLAT),
    "prefix_ungated": (methods.prefix_tuning(6, 20, gated=False), PREFIX),
    "mh_parallel": (
        (
            Adapter(
                *("prefix", "attention.heads", Prefix(6, 20, "relu")),
                shared=("embedding", "down"),
            ),
        ),
        f"{PREFIX}|{QUERY_NORM}",
    ),
    "attn_parallel": (at_attention("attention.heads", "block_input"), "$^"),
    "attn_sequential": (at_attention("attention.projection", "state"), "$^"),
    "ffn_sequential": (methods.adapter(10), "$^"),
    "ffn_pfeiffer": (methods.pfeiffer(10), "$^"),
    "ffn_parallel": (methods.parallel(10), SECOND_COPY),
    "ffn_scaled_parallel": (methods.parallel(10, scale=4.0), SECOND_COPY),
    "ffn_learned_scale": (methods.parallel(10, scale="learned"), SECOND_COPY),
    "lora_attn": (methods.lora(6, 12), "$^"),
    "lora_ffn": (methods.lora(10, 12, ("ffn_in", "ffn_out")), "$^"),
    "mam": (
        methods.prefix_tuning(6, 20) + methods.parallel(10, scale=2.0),
        f"{PREFIX}|{SECOND_COPY}",
    ),
}


def load(shared: Path, variant: str) -> SimpleNamespace:
    """The config, the state dict, the prefix module, and the file itself."""
    with np.load(shared / "golden" / "unified_view" / f"{variant}.npz") as file:
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


@pytest.fixture(scope="module", params=tiny.mostly_slow(VARIANTS, "ffn_pfeiffer", "mam"))
def golden(request: pytest.FixtureRequest, shared: Path) -> SimpleNamespace:
    """One variant's file with the model and variables converted from it."""
    golden = load(shared, request.param)
    model, golden.variables = convert(golden)
    golden.model = model
    golden.method, golden.unused = VARIANTS[request.param]
    ids, mask = (golden.arrays[k].astype(np.int32) for k in ("input_ids", "attention_mask"))

    @jax.jit
    def outputs(variables: Any) -> Any:
        types = np.zeros(ids.shape, np.int32)
        hidden = model.apply(variables, ids, types, mask, 0, method="encode")
        return hidden, model.apply(variables, hidden, 0, method="pool")

    golden.outputs = outputs
    return golden


def test_every_file_is_a_variant(shared: Path) -> None:
    files = (shared / "golden" / "unified_view").glob("*.npz")
    assert {file.stem for file in files} == set(VARIANTS)


def test_method(golden: SimpleNamespace) -> None:
    assert golden.model.method == golden.method
    assert golden.model.num_outputs == (2,)
    assert golden.model.config.model_type == "roberta"


def test_outputs(golden: SimpleNamespace) -> None:
    hidden, pooled = golden.outputs(golden.variables)
    np.testing.assert_allclose(hidden, golden.arrays["last_hidden_state"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled, golden.arrays["pooler_output"], rtol=0, atol=1e-5)


def test_every_parameter_matters(golden: SimpleNamespace) -> None:
    """So the bound on the outputs means something: each tensor moves them by far more."""
    hidden, _ = golden.outputs(golden.variables)
    leaves, structure = jax.tree.flatten(golden.variables)
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(golden.variables)):
        if path[0].key == "adapters" and path[1].key != "head":
            other = leaf + np.cos(np.arange(leaf.size)).reshape(leaf.shape)
            changed = jax.tree.unflatten(structure, [*leaves[:i], other, *leaves[i + 1 :]])
            assert np.abs(golden.outputs(changed)[0] - hidden).max() > 100 * 1e-5, path


def test_round_trip_is_exact(golden: SimpleNamespace) -> None:
    state_dict, prefix_state = to_unified_view(golden.model, golden.variables)
    ours = state_dict | {f"prefix/{k}": v for k, v in prefix_state.items()}
    theirs = golden.state_dict | {f"prefix/{k}": v for k, v in golden.prefix_state.items()}
    unused = rf"embeddings\.position_ids$|{golden.unused}"
    assert ours.keys() == {name for name in theirs if not re.match(unused, name)}
    for name, tensor in ours.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def test_left_overs_have_no_effect(golden: SimpleNamespace) -> None:
    tensors = to_unified_view(golden.model, golden.variables)
    model, variables = from_unified_view(golden.config, *tensors)
    assert model == golden.model
    tiny.assert_same(variables, golden.variables)


def test_options_that_no_file_has(shared: Path) -> None:
    golden = load(shared, "ffn_sequential")
    for layer in (0, 1):
        adapter = f"encoder.layer.{layer}.output.ef_ffn_adapter"
        golden.state_dict |= {
            f"{adapter}.adapter_layer_norm_before.weight": np.full(48, 2.0, np.float32),
            f"{adapter}.adapter_layer_norm_before.bias": np.full(48, 3.0, np.float32),
        }
    model, variables = convert(
        *(golden,),
        labels=[5],
        ffn_adapter_layernorm_option="in",
        ffn_adapter_init_option="lora",
        ffn_adapter_scalar="0.5",
    )
    assert model.num_outputs == (5,)
    form = Bottleneck(10, "relu", "lora", norm=True)
    assert model.method == (Adapter("ffn_adapter", "ffn.output", form, "state", scale=0.5),)
    norm = variables["adapters"]["ffn_adapter"]["layers"]["norm"]
    assert (norm["scale"] == 2).all()
    assert (norm["bias"] == 3).all()

    golden = load(shared, "lora_attn")
    model, _ = convert(golden, lora_dropout=0.3)
    assert model.method == methods.lora(6, 12, dropout=0.3)


# Refusals


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("prefix", {"attn_mode": "bitfit"}, "attn_mode 'bitfit'"),
        ("prefix", {"attn_mode": "prompt_tuning"}, "attn_mode 'prompt_tuning'"),
        ("prefix", {"attn_option": "cross_attn"}, "attn_option 'cross_attn' are not supported"),
        ("prefix", {"attn_composition": "gate_add"}, "attn_composition 'gate_add'"),
        ("mh_parallel", {"layer_norm_after": True}, "layer_norm_after True"),
        ("attn_parallel", {"attn_option": "concat"}, "'adapter' and attn_option 'concat'"),
        ("ffn_parallel", {"ffn_mode": "mh_adapter"}, "ffn_mode 'mh_adapter'"),
        ("ffn_parallel", {"ffn_option": "none"}, "'adapter' and ffn_option 'none'"),
        (
            *("ffn_parallel", {"ffn_adapter_layernorm_option": "out"}),
            "ffn_adapter_layernorm_option 'out'",
        ),
        ("ffn_parallel", {"ffn_adapter_scalar": "four"}, "ffn_adapter_scalar 'four'"),
        ("ffn_parallel", {"ffn_adapter_init_option": "he"}, "unknown init 'he'"),
        ("ffn_parallel", {"labels": [2, 3]}, "labels has 2"),
        ("lora_attn", {"attn_bn": 0}, "whole number from 1, not 0"),
    ],
)
def test_options_that_are_not_held(
    shared: Path, variant: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        convert(load(shared, variant), **options)
    assert message in str(error.value)


def test_a_config_that_lacks_options(shared: Path) -> None:
    golden = load(shared, "mam")
    del golden.config["attn_mode"], golden.config["ffn_bn"]
    with pytest.raises(UserError, match=r"lacks attn_mode, ffn_bn\."):
        convert(golden)


def test_every_ill_fitting_tensor_is_listed(shared: Path) -> None:
    golden = load(shared, "mam")
    del golden.state_dict["pooler.dense.bias"]
    adapter = "encoder.layer.1.ef_ffn_adapter"
    golden.state_dict[f"{adapter}.scale"] = np.ones(1, np.float32)
    golden.state_dict[f"{adapter}.up_proj.weight"] = np.zeros((10, 48), np.float32)
    golden.prefix_state["control_trans.2.weight"] = np.zeros((192, 21), np.float32)
    golden.prefix_state["decoder_self_attn_key.0.weight"] = np.zeros((6, 48), np.float32)
    with pytest.raises(UserError) as error:
        convert(golden)
    message = str(error.value)
    assert "missing pooler.dense.bias" in message
    assert f"unused {adapter}.scale" in message
    assert f"{adapter}.up_proj.weight is (10, 48) and not (48, 10)" in message
    assert "prefix/control_trans.2.weight[0] is (96, 21) and not (96, 20)" in message
    assert "prefix/control_trans.2.weight[1] is (96, 21) and not (96, 20)" in message
    assert "unused prefix/decoder_self_attn_key.0.weight" in message
    assert message.count(";") == 5


def test_left_overs_of_one_variant_are_unused_in_another(shared: Path) -> None:
    with pytest.raises(UserError, match=r"unused encoder\.layer\.0\.attention\.self\.ef_transf"):
        convert(load(shared, "mh_parallel"), attn_option="concat")
    with pytest.raises(UserError, match=r"unused encoder\.layer\.1\.output\.ef_ffn_adapter\.down"):
        convert(load(shared, "ffn_parallel"), ffn_mode="none")
    with pytest.raises(UserError, match=r"unused prefix/wte\.weight; unused prefix/wte2\."):
        convert(load(shared, "mam"), attn_mode="none")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (methods.pals(6, 3), "pal"),
        (methods.bitfit(), "biases"),
        (methods.adapter(5, "gelu"), "ffn_adapter"),
        (methods.parallel(5, site="attention"), "attention_adapter"),  # without a layer norm
        (methods.lora(2, targets=("query", "key")), "lora_key"),
        (methods.multi_head_parallel(5) + methods.lora(2), "lora_value"),
        (methods.adapter(5) + methods.lora(2, targets=("ffn_in",)), "lora_ffn_in"),
        ((Adapter("top", "ffn.output", Bottleneck(5, "relu"), layers=(-1,)),), "top"),
    ],
)
def test_what_the_original_cannot_hold(method: Method, name: str) -> None:
    model = MultiTaskModel(ROBERTA, (2,), method)
    with pytest.raises(UserError, match=f"cannot hold '{name}'"):
        to_unified_view(model, tiny.variables(model))


@pytest.mark.parametrize(
    "model", [MultiTaskModel(tiny.config(), (2,)), MultiTaskModel(ROBERTA, (2, 2))]
)
def test_only_one_task_on_a_roberta_goes_out(model: MultiTaskModel) -> None:
    with pytest.raises(UserError, match="only one task, on a RoBERTa"):
        to_unified_view(model, tiny.variables(model))
