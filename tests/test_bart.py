"""Weights of Hugging Face's BART, mBART and Marian, compared with transformers' PyTorch models."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import transformers

from pals_jax.convert import (
    from_huggingface,
    from_peft,
    to_conditional_generation,
    to_peft,
)
from pals_jax.models.adapters import methods
from pals_jax.runtime.errors import UserError
from pals_jax.training.losses import token_losses

ARRAYS = tuple(tiny.texts().values())

CLASSES = {
    "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
    "mbart": (transformers.MBartConfig, transformers.MBartForConditionalGeneration),
    "marian": (transformers.MarianConfig, transformers.MarianMTModel),
}


def write(directory: Path, model_type: str) -> Any:
    """A random model of PyTorch, saved; its sizes are odd, and nothing in it is zero or one."""
    config_class, model_class = CLASSES[model_type]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=31,
        decoder_vocab_size=31,
        d_model=15,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=5,
        decoder_attention_heads=3,
        encoder_ffn_dim=21,
        decoder_ffn_dim=17,
        max_position_embeddings=9,
        init_std=0.4,
        activation_function="swish" if model_type == "marian" else "gelu",
        scale_embedding=model_type != "bart",
        pad_token_id=1,
        decoder_start_token_id=1,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor) * (tensor.ndim == 1))
        model.final_logits_bias.normal_()
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=CLASSES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A directory, and PyTorch's model of what is in it."""
    directory = tmp_path_factory.mktemp(request.param)
    return directory, write(directory, request.param)


def assert_parity(directory: Path, theirs: Any, arrays: Any, dtype: Any = np.float32) -> None:
    """Hidden states, logits and loss equal PyTorch's at real positions, at unit scale."""
    names = "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"
    inputs = {k: torch.tensor(x.copy()) for k, x in zip(names, arrays, strict=True)}
    labels = (
        inputs["decoder_input_ids"].long().masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    )
    with torch.no_grad():
        expected = theirs(**inputs, labels=labels, output_hidden_states=True)
    model, variables = from_huggingface(directory, dtype=dtype)

    @jax.jit
    def outputs(variables: Any) -> Any:
        encoded = model.apply(variables, *arrays[:2], 0, method="encode")
        hidden = model.apply(variables, *arrays, 0, method="decode")
        return encoded, hidden, model.apply(variables, *arrays, 0)

    encoded, hidden, logits = outputs(variables)
    assert logits.dtype == np.float32
    source, target = arrays[1] > 0, arrays[3] > 0
    for actual, desired, real in (
        (encoded, expected.encoder_last_hidden_state, source),
        (hidden, expected.decoder_hidden_states[-1], target),
        (logits, expected.logits, target),
    ):
        bound = 1e-5 * max(1.0, float(desired[real].abs().max()))
        np.testing.assert_allclose(actual[real], desired[real], rtol=0, atol=bound)
    loss = token_losses(logits, np.asarray(arrays[2]), 0.0)[target].mean()
    np.testing.assert_allclose(loss, expected.loss, rtol=1e-5)


def test_hidden_states_and_logits_are_those_of_pytorch(saved: Any) -> None:
    assert_parity(*saved, ARRAYS)


@pytest.mark.slow
def test_the_real_marian(shared: Path) -> None:
    """English to French, in float32; its file has half precision and no tables of positions."""
    directory = shared / "models" / "opus-mt-en-fr"
    theirs = transformers.MarianMTModel.from_pretrained(directory, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(2, 59513, (2, 17)), rng.integers(2, 59513, (2, 11))
    targets[:, 0] = 59513
    mask, target_mask = np.ones_like(ids), np.ones_like(targets)
    mask[1, 9:], target_mask[1, 6:] = 0, 0
    assert_parity(directory, theirs, (ids, mask, targets, target_mask))


def change(directory: Path, tmp_path: Path, config: Any = None, tensors: Any = None) -> Path:
    """A copy of a saved model with changes; a tensor that becomes None is left out."""
    old = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old | (config or {})))
    file = safetensors.numpy.load_file(directory / "model.safetensors") | (tensors or {})
    file = {name: tensor for name, tensor in file.items() if tensor is not None}
    safetensors.numpy.save_file(file, tmp_path / "model.safetensors")
    return tmp_path


SHARED = "model.shared.weight"


def test_the_table_of_words_may_be_stored_under_another_of_its_names(
    saved: Any, tmp_path: Path
) -> None:
    directory, theirs = saved
    words = theirs.model.shared.weight.detach().numpy().copy()
    copy = change(directory, tmp_path, tensors={SHARED: None, "lm_head.weight": words})
    tiny.assert_same(from_huggingface(copy)[1], from_huggingface(directory)[1])


def test_tensors_that_do_not_fit(saved: Any, tmp_path: Path) -> None:
    directory, theirs = saved
    words = theirs.model.shared.weight.detach().numpy() + 1
    block = "model.encoder.layers.1"
    tensors = {
        "model.decoder.embed_tokens.weight": words,
        f"{block}.fc1.bias": None,
        f"{block}.fc3.bias": np.zeros(3, np.float32),
        f"{block}.fc2.weight": np.zeros((3, 4), np.float32),
    }
    with pytest.raises(UserError) as error:
        from_huggingface(change(directory, tmp_path, tensors=tensors))
    for part in (
        "model.decoder.embed_tokens.weight differs from another copy of the same matrix",
        f"missing {block}.fc1.bias",
        f"unused {block}.fc3.bias",
        f"{block}.fc2.weight is (3, 4) and not (15, 21)",
    ):
        assert part in str(error.value)
    assert str(error.value).count(";") == 3


def test_positions_of_marian_are_computed(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    theirs = write(tmp_path / "saved", "marian")
    table = theirs.model.encoder.embed_positions.weight.detach().numpy().copy()
    name = "model.encoder.embed_positions.weight"
    given = change(tmp_path / "saved", tmp_path, tensors={name: table})
    tiny.assert_same(from_huggingface(given)[1], from_huggingface(tmp_path / "saved")[1])
    wrong = change(tmp_path / "saved", tmp_path, tensors={name: table[:, ::-1].copy()})
    with pytest.raises(UserError, match=r"embed_positions\.weight is not the table of sines"):
        from_huggingface(wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tie_word_embeddings": False}, "share one table of words"),
        ({"share_encoder_decoder_embeddings": False}, "share one table of words"),
        ({"decoder_vocab_size": 17}, "share one table of words"),
        ({"decoder_attention_heads": 4}, "d_model 15 is not a multiple of decoder_attention_heads"),
        ({"activation_function": "silly"}, "activation_function 'silly'"),
        ({"model_type": "t5"}, "describes a 't5' model"),
    ],
)
def test_architectures_that_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "saved").mkdir()
    write(tmp_path / "saved", "bart")
    with pytest.raises(UserError, match=message):
        from_huggingface(change(tmp_path / "saved", tmp_path, config))


# Out to Hugging Face


@pytest.mark.slow
def test_a_merged_task_is_a_model_of_transformers(saved: Any, tmp_path: Path) -> None:
    """The second of two tasks, with LoRA at every attention and layer norms of its own."""
    directory, theirs = saved
    method = methods.lora(2, 4.0) + methods.layer_norms()
    model, _ = from_huggingface(directory, adapters=method, tasks=(1, 1))
    variables = tiny.variables(model)
    alone, merged = to_conditional_generation(model, variables, 1, directory, tmp_path / "out")
    assert alone.method == ()
    exported = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert_parity(tmp_path / "out", exported, ARRAYS)
    tiny.assert_same(from_huggingface(tmp_path / "out")[1], merged)
    logits = jax.jit(model.apply)(variables, *ARRAYS, 1)
    np.testing.assert_allclose(logits, jax.jit(alone.apply)(merged, *ARRAYS, 0), rtol=0, atol=1e-4)


def test_what_transformers_cannot_express(saved: Any, tmp_path: Path) -> None:
    model, variables = from_huggingface(saved[0], adapters=methods.adapter(2))
    with pytest.raises(UserError, match=r"task's ffn_adapter cannot be expressed in \w+, which"):
        to_conditional_generation(model, variables, 0, saved[0], tmp_path / "out")
    with pytest.raises(UserError, match="task id 1 is out of range"):
        to_conditional_generation(model, variables, 1, saved[0], tmp_path / "out")
    plain = tiny.seq2seq()
    with pytest.raises(UserError, match="is of another architecture"):
        to_conditional_generation(plain, tiny.variables(plain), 0, saved[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# LoRA of PEFT

# Its targets, and the parts of the method: all places alike, or each on its own.
PEFT = {
    "every attention": (["q_proj", "v_proj"], 2),
    "one of the decoder's": (r".*decoder.*(encoder_attn\.k_proj|\.1\.fc2)", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT)
def test_lora_of_peft(name: str, saved: Any, tmp_path: Path) -> None:
    """We compute what PEFT computes, and it loads what we write."""
    peft = pytest.importorskip("peft")
    directory, theirs = saved
    targets, parts = PEFT[name]
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.1
    )
    model_class = type(theirs)
    adapted = peft.get_peft_model(model_class.from_pretrained(directory), config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in (x for x in adapted.parameters() if x.requires_grad):
        torch.nn.init.normal_(parameter.data, 0.0, 0.3, generator=generator)
    adapted.save_pretrained(tmp_path / "theirs")
    model, variables = from_peft(directory, {"fr": tmp_path / "theirs"})
    assert len(model.method) == parts
    assert_logits(model, variables, adapted)
    to_peft(model, variables, 0, tmp_path / "ours")
    base = model_class.from_pretrained(directory)
    assert_logits(model, variables, peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval())
    back, again = from_peft(directory, {"fr": tmp_path / "ours"})
    assert back.method == model.method
    tiny.assert_same(again, variables)


def assert_logits(model: Any, variables: Any, theirs: Any) -> None:
    """They equal PyTorch's at real positions."""
    names = "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"
    with torch.no_grad():
        inputs = {k: torch.tensor(x.copy()) for k, x in zip(names, ARRAYS, strict=True)}
        expected = theirs(**inputs).logits
    real = ARRAYS[3] > 0
    bound = 1e-5 * max(1.0, float(expected[real].abs().max()))
    logits = jax.jit(model.apply)(variables, *ARRAYS, 0)
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=bound)
