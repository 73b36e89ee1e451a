"""Adapters of AdapterHub's library, against its outputs and its own files.

The files hold what version 1.3.0 gave on small random encoders (shared/README.md,
golden/adapterhub).
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from pals_jax.convert import from_adapterhub, from_huggingface, tables, to_adapterhub
from pals_jax.convert.adapterhub_config import read_method, write_method
from pals_jax.convert.files import read_tensors
from pals_jax.errors import UserError
from pals_jax.models import methods
from pals_jax.models.adapters import Adapter
from pals_jax.models.forms import Bottleneck, Scale
from pals_jax.models.multitask import MultiTaskModel

# What each of them is in our words.
METHODS = {
    "houlsby": tuple(
        Adapter(f"{block}_adapter", f"{block}.output", Bottleneck(12, "gelu"), reads="state")
        for block in ("attention", "ffn")
    ),
    "pfeiffer": methods.pfeiffer(size=12),
    "parallel": methods.parallel(size=12, init="lora"),
    "scaled_parallel": methods.scaled_parallel(size=12, scale=4.0),
    "prefix": methods.prefix_tuning(length=5, bottleneck=20),
    "prefix_flat": methods.prefix_tuning(length=5, bottleneck=0),
    "lora_qv": methods.lora(rank=3, alpha=6),
    "lora_all": methods.lora(3, 6, ("query", "key", "value", "ffn_in", "ffn_out")),
    "ia3": tuple(
        Adapter(f"ia3_{name}", site, Scale(), compose="multiply")
        for name, site in (
            ("key", "attention.key"),
            ("value", "attention.value"),
            ("ffn_in", "ffn.intermediate"),  # before the activation: methods.ia3 is behind it
        )
    ),
    "mam": methods.prefix_tuning(5, 20) + methods.scaled_parallel(size=12, scale=4.0),
}
SOME = ("pfeiffer", "prefix", "prefix_flat")


def place(shared: Path, folder: Path, architecture: str, method: str) -> SimpleNamespace:
    """A golden directory, with its encoder as Hugging Face would have it."""
    source = shared / "golden" / "adapterhub" / architecture / method
    base = folder / "base"
    base.mkdir()
    (base / "config.json").symlink_to(source / "config.json")
    (base / "model.safetensors").symlink_to(source / "base.safetensors")
    return SimpleNamespace(source=source, base=base, method=method)


@pytest.fixture(scope="module", params=("bert", "roberta"))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=METHODS)
def golden(
    request: pytest.FixtureRequest,
    architecture: str,
    shared: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    golden = place(shared, tmp_path_factory.mktemp("golden"), architecture, request.param)
    golden.model, golden.variables = from_adapterhub(golden.base, {"t": golden.source / "adapter"})
    with np.load(golden.source / "io.npz") as file:
        golden.io = {name: np.asarray(x) for name, x in file.items()}
    return golden


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


def outputs(model: MultiTaskModel, variables: Any, io: Any) -> Any:
    """Last hidden states, pooled, and last hidden states with all adapters off."""
    tokens = [io[name] for name in ("input_ids", "token_type_ids", "attention_mask")]

    @jax.jit
    def run(variables: Any, active: Any) -> Any:
        hidden = model.apply(variables, *tokens, 0, active, method="encode")
        return hidden, model.apply(variables, hidden, 0, method="pool")

    active = np.ones(model.config.num_hidden_layers, bool)
    return *run(variables, active), run(variables, ~active)[0]


# In


def test_outputs(golden: SimpleNamespace) -> None:
    hidden, pooled, bare = outputs(golden.model, golden.variables, golden.io)
    expected = [golden.io[name] for name in ("last_hidden_state", "pooler_output")]
    np.testing.assert_allclose(hidden, expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled, expected[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(bare, golden.io["base_last_hidden_state"], rtol=0, atol=1e-5)
    assert np.abs(hidden - bare).max() > 0.1  # the adapters do something


def test_methods_are_ours(golden: SimpleNamespace) -> None:
    assert golden.model.method == METHODS[golden.method]
    assert golden.model.num_outputs == (2,)


def test_pickles_and_safetensors_hold_the_same(golden: SimpleNamespace) -> None:
    files = ("adapter/pytorch_adapter.bin", "adapter_safetensors/adapter.safetensors")
    tiny.assert_same(*(read_tensors(golden.source / file) for file in files))


# Out


def check_part_of(ours: Any, theirs: Any) -> None:
    """What we write of a configuration is what they write."""
    if isinstance(ours, dict):
        for name in ours:
            check_part_of(ours[name], theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            check_part_of(one, other)
    else:
        assert ours == theirs


def test_the_same_files_come_out(golden: SimpleNamespace, tmp_path: Path) -> None:
    to_adapterhub(golden.model, golden.variables, 0, tmp_path / "t")
    folders = (tmp_path / "t", golden.source / "adapter_safetensors")
    ours, theirs = (safetensors.numpy.load_file(x / "adapter.safetensors") for x in folders)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], strict=True)
    documents = [json.loads((x / "adapter_config.json").read_text()) for x in folders]
    assert documents[0].keys() == documents[1].keys()
    check_part_of(*documents)


OTHERS = {
    "an odd size, some layers": methods.houlsby(5, norms=False, layers=(0, 2)),
    "a learned scale": methods.parallel(7, scale="learned"),
    "two kinds of bottleneck": methods.bert_n_pals_houlsby(4),
    "no activation": methods.adapter(30, "identity"),
    "mam": methods.mam(3, 5, "learned"),
    "a union of three": methods.prefix_tuning(3, 6) + methods.lora(7, 1.0) + methods.pfeiffer(5),
    "a prefix on some layers": tuple(
        dataclasses.replace(adapter, layers=(1, 2))
        for adapter in methods.prefix_tuning(4, 6)
        if isinstance(adapter, Adapter)
    ),
    "a flat prefix on some layers": tuple(
        dataclasses.replace(adapter, layers=(0, 2))
        for adapter in methods.prefix_tuning(4, 0)
        if isinstance(adapter, Adapter)
    ),
    "LoRA with dropout": methods.lora(3, 5.0, ("value", "ffn_in", "ffn_out"), dropout=0.1),
}


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder as Hugging Face would have it."""
    folder, model = tmp_path_factory.mktemp("tiny"), tiny.model(())
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    tensors = tables.write(tiny.variables(model), tables.bert(model.config))
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", OTHERS)
def test_round_trips_of_other_methods(case: str, tiny_base: Path, tmp_path: Path) -> None:
    model = tiny.model(OTHERS[case])
    variables = tiny.variables(model)
    directories = {name: tmp_path / name for name in ("a", "b", "c")}
    for task, directory in enumerate(directories.values()):
        to_adapterhub(model, variables, task, directory)
    back, again = from_adapterhub(tiny_base, directories)
    for name in {spec.name for spec in model.method}:
        tiny.assert_same(again["adapters"][name], variables["adapters"][name])
    assert write_method(back.method, back.config) == write_method(model.method, model.config)


@pytest.mark.parametrize("size", [1, 5, 7, 11, 12, 13, 24, 40])
def test_any_size_has_a_reduction_factor(size: int) -> None:
    method = methods.adapter(size)
    assert read_method(write_method(method, tiny.config()), tiny.config()) == method


NOT_THEIRS = {
    "shared": methods.shared(),
    "pals": methods.pals(6, 3),
    "layer_norms": methods.houlsby(5),
    "ia3_ffn": methods.ia3(),  # behind the activation
    "lora_output": methods.lora(2, targets=("query", "output")),
    "two LoRA": methods.lora(2) + methods.lora(3, targets=("key",)),
    "LoRA and IA3": methods.lora(2) + METHODS["ia3"][:1],
    "two at one place": (*methods.adapter(3), Adapter("x", "ffn.output", Bottleneck(2), "state")),
    "prefix": methods.prefix_tuning(3, 0, gated=False),
    "multi_head_adapter": methods.multi_head_parallel(3),
    "attention_adapter": methods.parallel(3, site="attention"),
    "a layer norm of its own": (Adapter("x", "ffn.output", Bottleneck(3, "relu", norm=True)),),
}


@pytest.mark.parametrize("case", NOT_THEIRS)
def test_methods_that_they_do_not_have(case: str, tmp_path: Path) -> None:
    model = MultiTaskModel(tiny.config(), (2,), NOT_THEIRS[case])
    with pytest.raises(UserError, match="AdapterHub has no place for"):
        to_adapterhub(model, {}, 0, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("task", [-1, 1])
def test_tasks_that_do_not_exist(task: int, tmp_path: Path) -> None:
    model = MultiTaskModel(tiny.config(), (2,), methods.adapter(3))
    with pytest.raises(UserError, match=f"task {task} does not exist"):
        to_adapterhub(model, {}, task, tmp_path / "t")


# Many


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
        ("pfeiffer", {"use_gating": True}, "use_gating=True (gates, as of UniPELT)"),
        ("pfeiffer", {"ln_after": True}, "ln_after=True"),
        ("pfeiffer", {"scaling": "channel"}, "'channel'"),
        ("pfeiffer", {"reduction_factor": {"default": 4}}, "reduction_factor of each layer"),
        ("pfeiffer", {"reduction_factor": "4"}, "makes no sense"),
        ("pfeiffer", {"reduction_factor": 0}, "makes no sense"),
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
    assert "the prediction head" in caplog.text
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
