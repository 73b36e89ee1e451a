"""Adapters of AdapterHub's library, compared with its outputs and its files."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from golden_adapterhub import place

from pals_jax.convert import from_adapterhub, tables, to_adapterhub
from pals_jax.convert.adapterhub_config import read_method, write_method
from pals_jax.convert.tensor_files import read_tensors
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck, Scale
from pals_jax.models.adapters.spec import Adapter
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

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


@pytest.fixture(scope="module", params=tiny.mostly_slow(("bert", "roberta"), "bert"))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=tiny.mostly_slow(METHODS, "houlsby", "prefix", "lora_all"))
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


@pytest.mark.parametrize("case", tiny.mostly_slow(OTHERS, "an odd size, some layers", "mam"))
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
    with pytest.raises(UserError, match="AdapterHub cannot hold"):
        to_adapterhub(model, {}, 0, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("task", [-1, 1])
def test_tasks_that_do_not_exist(task: int, tmp_path: Path) -> None:
    model = MultiTaskModel(tiny.config(), (2,), methods.adapter(3))
    with pytest.raises(UserError, match=f"task id {task} is out of range"):
        to_adapterhub(model, {}, task, tmp_path / "t")
