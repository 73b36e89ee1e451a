"""Checkpoints of other codes, as their directories lie on the disk: what is where, and reading it.

The tables of tensor names are in `pals_jax.convert`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pals_jax import convert
from pals_jax.convert import huggingface, peft, tensor_files
from pals_jax.data.tasks import Task
from pals_jax.models.architectures import Model
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import UserError

_BERT_N_PALS, _UNIFIED_VIEW = "hidden_size_aug", "attn_mode"  # keys that only their configs have
_TENSOR_FILES = (".safetensors", ".npz", ".bin")
_ENCODER = ("embeddings.", "encoder.", "pooler.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        model: the model.
        variables: its variables, float32.
        tasks: its tasks; their names and text columns are ours, because the checkpoint has none.
        directory: where its tokenizer would be.
        has_heads: whether it came with trained heads.
    """

    model: MultiTaskModel
    variables: Mapping[str, Any]
    tasks: tuple[Task, ...]
    directory: Path
    has_heads: bool = True


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of another code.

    Attributes:
        holds: whether a path is of this format, judged by its files' names and configuration.
        read: the checkpoint of a path or a hub id, and the base that was named with it or "".
        needs_base: it lacks the encoder that it was trained on.
    """

    holds: Callable[[Path], bool]
    read: Callable[[str, str], Checkpoint]
    needs_base: bool = False


def _tasks(counts: Iterable[int], name: str | None = None) -> tuple[Task, ...]:
    """Tasks with these numbers of outputs; a single one may have a name."""
    return tuple(
        Task(name or f"task{i}", (), labels=_labels(count)) for i, count in enumerate(counts)
    )


def _name(place: str | Path) -> str:
    """What the task of a checkpoint is called: the last part of the checkpoint's place."""
    return Path(place).resolve().name


def _labels(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count)) if count > 1 else ()


# ------------------------------------------------ adapters, which have a base


def _is_adapter(path: Path, *weights: str) -> bool:
    return (path / "adapter_config.json").is_file() and any(
        (path / name).is_file() for name in weights
    )


def _check_heads(model: Model, place: str, function: str) -> None:
    if isinstance(model, Seq2SeqModel):
        raise UserError(
            f"{place} is for an encoder-decoder, and its files do not name the columns of a task;"
            f" read them with {function} of pals_jax.convert."
        )


def _adapterhub(place: str, base: str) -> Checkpoint:
    directory = Path(place)
    model, variables = convert.from_adapterhub(base, {_name(place): directory})
    _check_heads(model, place, "from_adapterhub")
    tasks = (Task(_name(place), ()),)
    return Checkpoint(model, variables, tasks, directory, has_heads=False)


def _peft(place: str, base: str) -> Checkpoint:
    directory = Path(place)
    model, variables = convert.from_peft(base, {_name(place): directory})
    _check_heads(model, place, "from_peft")
    has_heads = peft.has_head(directory)
    tasks = _tasks(model.num_outputs if has_heads else (1,), _name(place))
    return Checkpoint(model, variables, tasks, directory, has_heads)


# ------------------------------------------------ whole models


def _huggingface(place: str, base: str) -> Checkpoint:
    directory = huggingface.resolve(place)
    model, variables = convert.from_sequence_classification(directory)
    config = tensor_files.read_json(directory / "config.json")
    names = {int(i): str(label) for i, label in (config.get("id2label") or {}).items()}
    labels = tuple(names[i] for i in sorted(names)) or _labels(*model.num_outputs)
    task = Task(_name(place), (), labels=labels if len(labels) > 1 else ())
    return Checkpoint(model, variables, (task,), directory)


def _bert_n_pals(place: str, base: str) -> Checkpoint:
    directory = Path(place)
    config, tensors = dict(_config_with(directory, _BERT_N_PALS)), _every_tensor(directory)
    heads = (tensors.get(f"classifier.{task}.weight") for task in range(len(tensors)))
    config.setdefault("labels", [len(head) for head in heads if head is not None])
    model, variables = convert.from_bert_n_pals(config, tensors)
    return Checkpoint(model, variables, _tasks(model.num_outputs), directory)


def _unified_view(place: str, base: str) -> Checkpoint:
    directory = Path(place)
    tensors = _every_tensor(directory)
    encoder = {name: x for name, x in tensors.items() if name.startswith(_ENCODER)}
    prefix = {name: x for name, x in tensors.items() if name not in encoder}
    config = dict(_config_with(directory, _UNIFIED_VIEW))
    model, variables = convert.from_unified_view(config, encoder, prefix)
    tasks = (Task(_name(place), ()),)
    return Checkpoint(model, variables, tasks, directory, has_heads=False)


def _tf_bert(place: str, base: str) -> Checkpoint:
    path = Path(place)
    directory, prefixes = (path, _tf_prefixes(path)) if path.is_dir() else (path.parent, [path])
    if len(prefixes) > 1:
        names = ", ".join(prefix.name for prefix in prefixes)
        raise UserError(f"{place} has several checkpoints, {names}; load the path of one of them.")
    variables = convert.read_tf_checkpoint(prefixes[0] if prefixes else path / "bert_model.ckpt")
    config = tensor_files.read_json(directory / "bert_config.json")
    model, converted = convert.from_tf_bert(config, variables)
    has_heads = "output_weights" in variables
    tasks = _tasks(model.num_outputs if has_heads else (1,), _name(place))
    return Checkpoint(model, converted, tasks, directory, has_heads)


def _tf_prefixes(directory: Path) -> list[Path]:
    return [path.with_suffix("") for path in sorted(directory.glob("*.ckpt*.index"))]


# ------------------------------------------------ their files


def _config_with(directory: Path, key: str) -> Mapping[str, Any]:
    """The first configuration in a directory that has a key; empty if there is none."""
    for path in sorted(directory.glob("*config.json")):
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and key in config:
            return config
    return {}


def _every_tensor(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of all files in a directory, without the outer module's name."""
    files = [path for path in sorted(directory.iterdir()) if path.suffix in _TENSOR_FILES]
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        tensors |= tensor_files.read_tensors(path)
    if not tensors:
        raise UserError(f"{directory} has no tensor file ({', '.join(_TENSOR_FILES)}).")
    return {name.removeprefix("module.").removeprefix("roberta."): x for name, x in tensors.items()}


def _is_huggingface(path: Path) -> bool:
    of_others = any(_config_with(path, key) for key in (_BERT_N_PALS, _UNIFIED_VIEW))
    return not of_others and huggingface.has_model_files(path) and huggingface.has_classifier(path)


FOREIGN: Mapping[str, Format] = {
    "adapterhub": Format(
        lambda path: _is_adapter(path, "adapter.safetensors", "pytorch_adapter.bin"),
        _adapterhub,
        needs_base=True,
    ),
    "peft": Format(
        lambda path: _is_adapter(path, "adapter_model.safetensors", "adapter_model.bin"),
        _peft,
        needs_base=True,
    ),
    "huggingface": Format(_is_huggingface, _huggingface),
    "bert_n_pals": Format(lambda path: bool(_config_with(path, _BERT_N_PALS)), _bert_n_pals),
    "unified_view": Format(lambda path: bool(_config_with(path, _UNIFIED_VIEW)), _unified_view),
    "tf_bert": Format(
        lambda path: bool(_tf_prefixes(path)) or Path(f"{path}.index").is_file(),
        _tf_bert,
    ),
}
