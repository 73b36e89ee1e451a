"""Hugging Face's BART, mBART and Marian: architecture, table of names, weights in and out."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pals_jax.convert import tables, tensor_files
from pals_jax.convert.tables import Slot, Tensors
from pals_jax.models.bart import MODEL_TYPES, BartConfig, sinusoids
from pals_jax.models.merge import merged
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import UserError

# The transformers class of each `model_type`.
CLASSES = {
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "marian": "MarianMTModel",
}
# The table of words, and names under which a file may hold copies of it.
SHARED = "model.shared.weight"
COPIES = (
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)
MAY_LACK = "|".join(map(re.escape, (*COPIES, "final_logits_bias")))

# For each site, the module of a layer whose output is the state there.
MODULES: Mapping[str, str] = {
    f"{ours}.{site}": f"{theirs}.{module}"
    for ours, theirs in (("attention", "self_attn"), ("cross_attention", "encoder_attn"))
    for site, module in (
        *(("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")),
        ("projection", "out_proj"),
    )
} | {"ffn.intermediate": "fc1", "ffn.projection": "fc2"}

# Settings of a `config.json` by which a model would be another than ours.
_TIED = ("tie_word_embeddings", "share_encoder_decoder_embeddings")


def is_bart(directory: Path) -> bool:
    """Whether `config.json` describes one of these models."""
    return tensor_files.read_json(directory / "config.json").get("model_type") in MODEL_TYPES


def read_config(directory: Path) -> BartConfig:
    """The architecture in `config.json`.

    Raises:
        UserError: the model has several tables of words.
    """
    path = directory / "config.json"
    config = tensor_files.read_json(path)
    sizes = {config.get("vocab_size"), config.get("decoder_vocab_size", config.get("vocab_size"))}
    if len(sizes) > 1 or any(config.get(name) is False for name in _TIED):
        raise UserError(
            f"{path} has {', '.join(_TIED)} false or a decoder_vocab_size of its own; only models"
            " whose source, target and output share one table of words are supported."
        )
    return BartConfig.from_mapping({k: v for k, v in config.items() if v is not None})


def load_variables(model: Seq2SeqModel, directory: Path, seed: int) -> dict[str, Any]:
    """The variables of a model on the weights in a directory; adapters are new.

    Raises:
        UserError: the directory is of another architecture, or its tensors do not fit.
    """
    if read_config(directory) != model.config:
        raise UserError(
            f"{directory} is of another architecture than the model; they differ in"
            f" {', '.join(differing(read_config(directory), model.config))}."
        )
    tensors = tensor_files.read_model(directory)
    return read(model, bart(model.config), tensors, str(directory / tensor_files.MODEL), seed)


def differing(one: BartConfig, other: BartConfig) -> list[str]:
    """The names of the fields in which two architectures differ."""
    fields = dataclasses.asdict(one), dataclasses.asdict(other)
    return [name for name in fields[0] if fields[0][name] != fields[1][name]]


def read(
    model: Seq2SeqModel,
    slots: Iterator[Slot],
    tensors: Tensors,
    source: str,
    seed: int = 0,
    may_ignore: str = "$^",
) -> dict[str, Any]:
    """`tables.read`, for files that hold the table of words once or several times."""
    named = {_current_name(name): tensor for name, tensor in tensors.items()}
    copies = [named[name] for name in COPIES if name in named]
    if SHARED not in named and copies:
        named[SHARED] = copies[0]
    if model.config.model_type == "marian":
        named = _without_sinusoids(named, model.config, source)
    # Without a method there is nothing that belongs to tasks.
    return {"adapters": {}} | tables.read(
        model, slots, named, source=source, seed=seed, may_lack=MAY_LACK, may_ignore=may_ignore
    )


def _current_name(name: str) -> str:
    """Names of a bare model, without its output projection, begin without "model."."""
    return f"model.{name}" if re.match(r"(shared|encoder|decoder)\.", name) else name


def _without_sinusoids(tensors: Tensors, config: BartConfig, source: str) -> dict[str, np.ndarray]:
    """The tensors without Marian's position tables, which are computed; if given, they agree."""
    left = dict(tensors)
    expected = sinusoids(config.max_position_embeddings, config.d_model)
    for block in config.stacks:
        given = left.pop(name := f"model.{block}.embed_positions.weight", expected)
        if given.shape != expected.shape or np.abs(given - expected).max() > 1e-3:
            raise UserError(f"{source} does not fit the model: {name} is not the table of sines.")
    return left


def bart(config: BartConfig) -> Iterator[Slot]:
    """The model under the names of Hugging Face's `BartForConditionalGeneration`."""
    vocabulary = ("params", "vocabulary")
    yield Slot("final_logits_bias", (*vocabulary, "logits_bias"), (None,))
    for name in (SHARED, *COPIES):
        yield Slot(name, (*vocabulary, "embedding"))
    for block, stack in config.stacks.items():
        name, path = f"model.{block}", ("params", block)
        if config.model_type != "marian":
            embeddings = (*path, "embeddings")
            table = (*embeddings, "position", "embedding")
            yield Slot(f"{name}.embed_positions.weight", table)
            yield from tables.norm(f"{name}.layernorm_embedding", (*embeddings, "norm"))
        for i in range(stack.num_hidden_layers):
            layer = f"{name}.layers.{i}"
            yield from _layer(layer, (*path, "layers"), (i,), cross=block == "decoder")
        if stack.pre_norm:
            yield from tables.norm(f"{name}.layer_norm", (*path, "norm"))


def _layer(name: str, path: tables.Path, index: tuple[int], cross: bool) -> Iterator[Slot]:
    """One layer of the encoder or the decoder."""
    attentions = {"attention": "self_attn"} | ({"cross_attention": "encoder_attn"} if cross else {})
    for ours, theirs in attentions.items():
        for site, module in MODULES.items():
            block, _, part = site.partition(".")
            if block == ours:
                part = "output" if part == "projection" else part
                yield from tables.dense(f"{name}.{module}", (*path, ours, part), index)
        yield from tables.norm(f"{name}.{theirs}_layer_norm", (*path, f"{ours}_norm"), index)
    yield from tables.dense(f"{name}.fc1", (*path, "ffn", "intermediate"), index)
    yield from tables.dense(f"{name}.fc2", (*path, "ffn", "output"), index)
    yield from tables.norm(f"{name}.final_layer_norm", (*path, "ffn_norm"), index)


def to_conditional_generation(
    model: Seq2SeqModel,
    variables: Mapping[str, Any],
    task: int,
    base: str | Path,
    directory: Path,
) -> tuple[Seq2SeqModel, dict[str, Any]]:
    """Writes one task as a directory for transformers; see `to_sequence_classification`.

    The task's changes to the model's weights (LoRA, IA3, its own layer norms, biases or layers) are
    merged into them. The tokenizer is not written.

    Args:
        model: the model of T tasks.
        variables: the model's variables.
        task: the index of the task.
        base: the directory of the pretrained model, whose `config.json` and, if there is one,
            `generation_config.json` are copied.
        directory: the output directory, created if missing.

    Returns:
        The written model (T = 1, no adapters) and its variables.

    Raises:
        UserError: if there is no such task, the base is of another architecture, or the method
            cannot be expressed in the model's weights; nothing is written then.
    """
    model, variables = merged(model, variables, task)
    if model.method:
        left = ", ".join(spec.name for spec in model.method)
        raise UserError(
            f"the task's {left} cannot be expressed in {CLASSES[model.config.model_type]}, which"
            " has no place for adapters; export a task trained with lora, ia3 or copies of the"
            " model's parameters."
        )
    base = Path(base)
    if read_config(base) != model.config:
        raise UserError(f"{base} is of another architecture; give the model that was adapted.")
    tensors = tables.write(variables, bart(model.config))
    named = {name: tensor for name, tensor in tensors.items() if name not in COPIES}
    directory.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensors(directory / tensor_files.MODEL, named, {"format": "pt"})
    config = tensor_files.read_json(base / "config.json") | {"dtype": "float32"}
    config = {name: value for name, value in config.items() if name != "torch_dtype"}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if (generation := base / "generation_config.json").exists():
        shutil.copyfile(generation, directory / generation.name)
    return model, variables
