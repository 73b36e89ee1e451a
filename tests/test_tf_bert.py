"""Google's TensorFlow checkpoints with and without adapters, compared with the original code."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from pals_jax.convert.tf_bert import from_tf_bert, to_tf_bert
from pals_jax.convert.tf_checkpoint import read_tf_checkpoint
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.methods import Method
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

VARIANTS = ("plain", "adapters")


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, shared: Path) -> Path:
    return shared / "golden" / "adapter_bert" / request.param


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "io.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bert_config.json").read_text())


@pytest.fixture(scope="module")
def original(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix("var/"): x for k, x in golden.items() if k.startswith("var/")}


# Models


def test_outputs_of_the_original(config, golden, original, folder):
    model, variables = from_tf_bert(config, original)
    assert model.method == (methods.houlsby(64, "gelu_new") if folder.name == "adapters" else ())

    @jax.jit
    def run(variables, input_ids, segment_ids, mask):
        hidden = model.apply(variables, input_ids, segment_ids, mask, 0, method="encode")
        return hidden, model.apply(variables, hidden, 0, method="pool")

    inputs = (golden[name] for name in ("input_ids", "segment_ids", "input_mask"))
    hidden, pooled = run(variables, *inputs)
    assert golden["sequence_output"].std() > 0.2
    np.testing.assert_allclose(hidden, golden["sequence_output"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled, golden["pooled_output"], rtol=0, atol=1e-5)


def test_any_method_on_a_pre_trained_one(config, golden, original, folder):
    method = methods.lora() + methods.pooler()
    if folder.name == "adapters":
        with pytest.raises(UserError, match="unused bert/encoder/layer_0/attention/output/adapt"):
            from_tf_bert(config, original, method)
        return
    model, variables = from_tf_bert(config, original, method, tasks=(2, 1, 3))
    assert (model.method, model.num_outputs) == (method, (2, 1, 3))
    inputs = (golden[name] for name in ("input_ids", "segment_ids", "input_mask"))
    hidden = jax.jit(model.apply, static_argnames="method")(
        variables, *inputs, 1, method="encode"
    )  # LoRA changes nothing yet
    np.testing.assert_allclose(hidden, golden["sequence_output"], rtol=0, atol=1e-5)
    pooler = variables["params"]["encoder"]["pooler"]["dense"]["kernel"]
    mine = variables["adapters"]["pooler"]["pooler"]["dense"]["kernel"]
    np.testing.assert_array_equal(mine, [pooler] * 3)
    model, _ = from_tf_bert(config, original, methods.pals(6))
    assert (model.method, model.num_outputs) == (methods.pals(6), (2,))


def test_there_and_back(config, original):
    head = {
        "output_weights": np.arange(3 * 48, dtype=np.float32).reshape(3, 48),
        "output_bias": np.arange(3, dtype=np.float32),
    }
    slots = {f"{name}/adam_{m}": x for name, x in (original | head).items() for m in "mv"}
    more = {"global_step": np.int64(7), "cls/predictions/output_bias": np.zeros(71), **slots}
    model, variables = from_tf_bert(config, original | head | more)
    assert model.num_outputs == (3,)
    np.testing.assert_array_equal(variables["adapters"]["head"]["kernel"][0, 1], [1, 49, 97])
    tiny.assert_same(to_tf_bert(model, variables, 0), original | head)


def test_a_task_takes_its_own_layer_norms_along():
    config = tiny.config(hidden_act="gelu_new")
    model = MultiTaskModel(config, tiny.NUM_OUTPUTS, methods.houlsby(5, "gelu_new"))
    variables, batch = tiny.variables(model), tiny.inputs()
    tensors = to_tf_bert(model, variables, 2)
    norms = variables["adapters"]["layer_norms"]["layers"]["attention_norm"]["scale"]
    name = "bert/encoder/layer_1/attention/output/LayerNorm/gamma"
    np.testing.assert_array_equal(tensors[name], norms[2, 1])
    settings = {name: getattr(config, name) for name in vars(config)} | {"hidden_act": "gelu"}
    alone, read = from_tf_bert(settings, tensors)
    expected = jax.jit(model.apply)(variables, **batch, task_ids=2)
    actual = jax.jit(alone.apply)(read, **batch, task_ids=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (methods.pals(size=6, heads=3), {}, "^the task's pal cannot be expressed"),
        (methods.houlsby(size=5), {}, "^the task's attention_adapter, ffn_adapter cannot"),
        (methods.adapter(size=5), {}, "^the task's ffn_adapter cannot be expressed"),
        ((), {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ((), {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ((), {"model_type": "roberta"}, "the encoder is a roberta"),
    ],
)
def test_what_has_no_place_is_refused(method: Method, changes: Any, message: str):
    model = MultiTaskModel(tiny.config(**{"hidden_act": "gelu_new"} | changes), (2,), method)
    with pytest.raises(UserError, match=message):
        to_tf_bert(model, tiny.variables(model), 0)


def test_every_ill_fitting_variable_is_listed(config, original):
    spoilt = dict(original) | {
        "bert/pooler/dense/bias": np.zeros(4),
        "bert/encoder/layer_2/output/dense/bias": np.zeros(48),
        "output_bias": np.zeros(2),
    }
    del spoilt["bert/embeddings/LayerNorm/gamma"]
    with pytest.raises(UserError) as error:
        from_tf_bert(config, spoilt)
    for message in (
        "missing bert/embeddings/LayerNorm/gamma",
        "bert/pooler/dense/bias is (4,) and not (48,)",
        "unused bert/encoder/layer_2/output/dense/bias",
        "missing output_weights",
    ):
        assert message in str(error.value)


# Files


def test_files_hold_the_variables_bit_for_bit(folder, original):
    variables = read_tf_checkpoint(folder / "bert_model.ckpt")
    assert variables.keys() == original.keys()
    for name, array in original.items():
        assert variables[name].dtype == array.dtype
        np.testing.assert_array_equal(variables[name], array)


@pytest.fixture
def copied(shared: Path, tmp_path: Path) -> Path:
    for path in (shared / "golden" / "adapter_bert" / "plain").glob("bert_model.ckpt*"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / "bert_model.ckpt"


@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
@pytest.mark.parametrize("size", [0, 1, 47, 48, 1000, -1])
def test_files_cut_short(copied: Path, suffix: str, size: int):
    path = Path(f"{copied}{suffix}")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"bert_model\.ckpt is damaged"):
        read_tf_checkpoint(copied)


@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
def test_missing_files(copied: Path, suffix: str):
    Path(f"{copied}{suffix}").unlink()
    with pytest.raises(
        UserError, match=r"cannot read the TensorFlow checkpoint .*bert_model\.ckpt"
    ):
        read_tf_checkpoint(copied)


def test_a_damaged_index_is_refused_or_read(copied: Path):
    """Whatever byte is flipped, there is one sentence or an answer, never another exception."""
    path = Path(f"{copied}.index")
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[position] ^= 0xFF
        path.write_bytes(spoilt)
        try:
            read_tf_checkpoint(copied)
        except UserError:
            refused += 1
    assert refused > 100
