"""Directories of AdapterHub's library: several at once, unsupported, damaged, from old versions."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tiny
from golden_adapterhub import place

from pals_jax.convert import from_adapterhub, from_huggingface
from pals_jax.runtime.errors import UserError

SOME = ("pfeiffer", "prefix", "prefix_flat")


@pytest.fixture
def copy(shared: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """A BERT and a copy of one of its adapters, its config or tensors changed."""

    def make(
        method: str = "pfeiffer", tensors: Callable[[Any], Any] | None = None, **config: Any
    ) -> SimpleNamespace:
        golden = place(shared, tmp_path, "bert", method)
        golden.adapter = shutil.copytree(golden.source / "adapter_safetensors", tmp_path / "copy")
        path = golden.adapter / "adapter.safetensors"
        if tensors:
            changed = tensors(safetensors.numpy.load_file(path))
            safetensors.numpy.save_file(changed, path)
        edit_json(golden.adapter / "adapter_config.json", config)
        return golden

    return make


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    """Changes the values at the top; a "config" is merged, its values None are removed."""
    document = json.loads(path.read_text())
    options = document["config"] | changes.pop("config", {})
    document |= changes | {"config": {k: v for k, v in options.items() if v is not None}}
    path.write_text(json.dumps(document))


# Many


@pytest.mark.slow
@pytest.mark.parametrize("method", SOME)
def test_many_adapters_on_one_base(method: str, copy: Callable[..., SimpleNamespace]) -> None:
    golden = copy(method, lambda tensors: {name: 0.5 * x for name, x in tensors.items()})
    paths = {"half": golden.adapter, "whole": golden.source / "adapter", "again": golden.adapter}
    model, variables = from_adapterhub(golden.base, paths)
    assert model.num_outputs == (2, 2, 2)
    for task, path in enumerate(paths.values()):
        _, alone = from_adapterhub(golden.base, {"t": path})
        own = {name: x for name, x in variables["adapters"].items() if name != "head"}
        tiny.assert_same(tiny.rows(own, task), tiny.rows({k: alone["adapters"][k] for k in own}, 0))
        tiny.assert_same(variables["params"], alone["params"])
    _, base = from_huggingface(golden.base)
    tiny.assert_same(variables["params"], base["params"])


def refused(golden: SimpleNamespace, *messages: str, **others: Path) -> None:
    with pytest.raises(UserError) as error:
        from_adapterhub(golden.base, {"copy": golden.adapter} | others)
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", ["houlsby", "parallel"])
def test_different_methods_are_refused(other: str, copy: Callable[..., SimpleNamespace]) -> None:
    golden = copy("pfeiffer")
    path = golden.source.parent / other / "adapter"
    refused(golden, "copy", "other", str(path), "differ in method", other=path)


def test_no_adapter(copy: Callable[..., SimpleNamespace]) -> None:
    with pytest.raises(UserError, match="no adapter to convert"):
        from_adapterhub(copy().base, {})


# What is refused, and what is understood


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("pfeiffer", {"phm_layer": True}, "phm_layer=True (Compacter)"),
        ("pfeiffer", {"inv_adapter": "nice"}, "inv_adapter='nice' (invertible adapters)"),
        ("pfeiffer", {"use_gating": True}, "use_gating=True (gates, as in UniPELT)"),
        ("pfeiffer", {"ln_after": True}, "ln_after=True"),
        ("pfeiffer", {"scaling": "channel"}, "'channel'"),
        ("pfeiffer", {"reduction_factor": {"default": 4}}, "reduction_factor for each layer"),
        ("pfeiffer", {"reduction_factor": "4"}, "is invalid"),
        ("pfeiffer", {"reduction_factor": 0}, "is invalid"),
        ("pfeiffer", {"non_linearity": "leakyrelu"}, "unknown activation 'leakyrelu'"),
        ("pfeiffer", {"non_linearity": None}, "lacks 'non_linearity'"),
        ("pfeiffer", {"architecture": "reft"}, "architecture 'reft'"),
        ("pfeiffer", {"architecture": "prompt_tuning"}, "architecture 'prompt_tuning'"),
        ("pfeiffer", {"leave_out": [0, 1]}, "leaves none of the encoder's 2 layers"),
        ("prefix", {"use_gating": True}, "use_gating=True"),
        ("prefix", {"non_linearity": "relu"}, "non_linearity='relu'"),
        ("prefix", {"prefix_length": 0}, "size"),
        ("lora_qv", {"use_dora": True}, "use_dora=True (DoRA)"),
        ("lora_qv", {"vera_d": 0.1}, "vera_d=0.1 (VeRA)"),
        ("lora_qv", {"r": 0}, "size"),
        ("ia3", {"r": 2}, "r=2"),
        ("mam", {"configs": [{"architecture": "reft"}]}, "architecture 'reft'"),
    ],
)
def test_options_that_are_not_held(
    copy: Callable[..., SimpleNamespace], method: str, config: dict[str, Any], message: str
) -> None:
    golden = copy(method, config=config)
    refused(golden, str(golden.adapter / "adapter_config.json"), message)


def test_fusion_is_refused(copy: Callable[..., SimpleNamespace]) -> None:
    golden = copy()
    (golden.adapter / "adapter_fusion_config.json").write_text("{}")
    refused(golden, str(golden.adapter), "AdapterFusion")


def test_missing_files(copy: Callable[..., SimpleNamespace]) -> None:
    golden = copy()
    (golden.adapter / "adapter.safetensors").unlink()
    refused(golden, "has no adapter.safetensors or pytorch_adapter.bin")
    (golden.adapter / "adapter_config.json").unlink()
    refused(golden, f"cannot read {golden.adapter / 'adapter_config.json'}")


def test_a_configuration_without_a_name(copy: Callable[..., SimpleNamespace]) -> None:
    refused(copy(name=None), "lacks the adapter's config or name")


def test_every_ill_fitting_tensor_is_listed(copy: Callable[..., SimpleNamespace]) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["encoder.layer.0.output.adapters.t.adapter_up.bias"]
        tensors["encoder.layer.1.output.adapters.t.adapter_up.bias"] = np.zeros(3, np.float32)
        return tensors | {"classifier.weight": np.zeros(2, np.float32)}

    golden = copy(tensors=spoil)
    refused(
        golden,
        f"missing {golden.adapter}: encoder.layer.0.output.adapters.t.adapter_up.bias",
        "encoder.layer.1.output.adapters.t.adapter_up.bias is (3,) and not (48,)",
        f"unused {golden.adapter}: classifier.weight",
    )


@pytest.mark.parametrize("method", ["prefix", "prefix_flat"])
def test_prefixes_that_cannot_be_cut(method: str, copy: Callable[..., SimpleNamespace]) -> None:
    golden = copy(method, lambda tensors: {name: x[1:] for name, x in tensors.items()})
    refused(golden, "missing", "unused", "self_prefix.control_trans")


@pytest.mark.parametrize("method", ["prefix", "prefix_flat"])
def test_copies_of_prefixes_may_lack(method: str, copy: Callable[..., SimpleNamespace]) -> None:
    golden = copy(
        method, lambda tensors: {k: x for k, x in tensors.items() if k.startswith("prefix_tuning.")}
    )
    paths = (golden.adapter, golden.source / "adapter")
    tiny.assert_same(*(from_adapterhub(golden.base, {"t": path})[1] for path in paths))


def test_copies_of_prefixes_must_agree(copy: Callable[..., SimpleNamespace]) -> None:
    name = "prefix_tuning.prefix_tunings.t.self_prefix.wte.weight"
    golden = copy("prefix", lambda tensors: tensors | {name: tensors[name] + 1})
    refused(golden, "differs from another copy of the same matrix")


def test_adapters_saved_from_a_model_with_a_head(
    copy: Callable[..., SimpleNamespace], caplog: pytest.LogCaptureFixture
) -> None:
    golden = copy("lora_qv", lambda tensors: {f"bert.{name}": x for name, x in tensors.items()})
    (golden.adapter / "head_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING, logger="pals_jax"):
        _, variables = from_adapterhub(golden.base, {"t": golden.adapter})
    assert "a new head with two outputs" in caplog.text
    tiny.assert_same(variables, from_adapterhub(golden.base, {"t": golden.source / "adapter"})[1])


def test_old_activations(copy: Callable[..., SimpleNamespace]) -> None:
    golden = copy("houlsby", version="")
    model, _ = from_adapterhub(golden.base, {"t": golden.adapter})
    assert model.method[0].form.activation == "gelu_new"


@pytest.mark.parametrize(("version", "scale"), [("1.0.1", 1.0), ("1.1.0", 2.0)])
def test_old_scales_of_lora(
    copy: Callable[..., SimpleNamespace], version: str, scale: float
) -> None:
    golden = copy("lora_qv", version=f"adapters.{version}")
    model, _ = from_adapterhub(golden.base, {"t": golden.adapter})
    assert model.method[0].scale == scale
