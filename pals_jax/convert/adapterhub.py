"""Import and export of adapters in the format of AdapterHub's library (`adapters`).

A directory holds `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`, without
the model, a BERT, RoBERTa or BART. A prefix tensor there covers the keys and values of all layers
of a stack; the tables here split it into one piece per layer ("control_trans.2[0]").
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pals_jax.convert import huggingface, stacking, tables, tensor_files
from pals_jax.convert.adapterhub_config import read_method, write_method
from pals_jax.convert.stacking import Part
from pals_jax.convert.tables import Slot, Tensors
from pals_jax.models.adapters.forms import Bottleneck, Prefix, Scale
from pals_jax.models.adapters.places import Place, places
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.architectures import Architecture, Model, num_tasks
from pals_jax.models.bart import BartConfig
from pals_jax.models.task_rows import check_task_ids
from pals_jax.runtime.errors import UserError

_VERSION = "adapters.1.3.0"  # the version whose format is written
_SAFETENSORS, _PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
# Per-layer copies of the one prefix, which only some versions of the library save.
_PREFIX_COPIES = r".*\.prefix_tuning\.pool\."
# For each `model_type` that the library and this module know, the class of the model.
_CLASSES = {"bert": "BertModel", "roberta": "RobertaModel", "bart": "BartForConditionalGeneration"}
# Of BART, for each site of a bottleneck adapter, the module of a layer that holds it.
_BART_MODULES = {
    "attention.output": "attention_adapters",
    "cross_attention.output": "cross_attention_adapters",
    "ffn.output": "output_adapters",
}
# Names of activations in files that predate the version field.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

_log = logging.getLogger(__name__)


def from_adapterhub(
    base_dir: str | Path, adapters: Mapping[str, str | Path]
) -> tuple[Any, dict[str, Any]]:
    """A model with one task per adapter, in the given order, on one encoder or encoder-decoder.

    Heads are not read: the library saves them separately (`head_config.json`) and allows kinds that
    this package does not have. Each task of an encoder gets a new, untrained head with two outputs;
    a warning is logged if a directory contains a head.

    Args:
        base_dir: the model that the adapters were trained on; a directory, a hub id, or anything
            else that `from_huggingface` accepts.
        adapters: maps each task name to a directory with `adapter_config.json` and
            `adapter.safetensors` or `pytorch_adapter.bin`; the latter needs PyTorch.

    Returns:
        A `MultiTaskModel` or a `Seq2SeqModel`, and its variables {"params", "adapters"} with
        float32 leaves.

    Raises:
        UserError: if a method is not supported, the methods differ, a file is damaged, or tensors
            do not fit; every problem is listed.
    """
    for directory in map(Path, adapters.values()):
        _look_around(directory)
    weights = _SAFETENSORS, _PICKLE
    return stacking.stack(base_dir, adapters, weights, _read_part, may_lack=_PREFIX_COPIES)


def to_adapterhub(
    model: Model, variables: Mapping[str, Any], task_index: int, directory: str | Path
) -> None:
    """Writes one task's adapter, without its head, for the library's `load_adapter`.

    Args:
        model: the model.
        variables: the model's variables.
        task_index: the index of the task.
        directory: the output directory, created if missing; its name becomes the adapter's name.

    Raises:
        UserError: if there is no such task, or the library does not have the method.
    """
    check_task_ids(num_tasks(model), task_index)
    _check_known(model.config)
    path = Path(directory).resolve()
    name = path.name.replace(".", "_")  # PyTorch module names must not contain dots
    config = {
        "config": write_method(model.method, model.config),
        "hidden_size": model.config.stacks["encoder"].hidden_size,
        "model_class": _CLASSES[model.config.model_type],
        "model_name": "",
        "model_type": model.config.model_type,
        "name": name,
        "version": _VERSION,
    }
    tensors = _join(tables.write(variables, adapterhub_slots(model, task_index, name)))
    tensor_files.write_adapter(path, config, _SAFETENSORS, tensors)


def _look_around(directory: Path) -> None:
    """Checks for other things that the library may have saved in the directory."""
    if (directory / "adapter_fusion_config.json").exists():
        raise UserError(
            f"{directory} holds an AdapterFusion, which is not supported; give the directories of"
            " single adapters."
        )
    if (directory / "head_config.json").exists():
        _log.warning(
            "the head in %s is not read; a new head with two outputs is initialised.", directory
        )


def _check_known(of: Architecture) -> None:
    if of.model_type not in _CLASSES:
        raise UserError(
            f"adapters of AdapterHub are supported on {', '.join(_CLASSES)}, and this is a"
            f" {of.model_type}; use task files, or PEFT for LoRA."
        )


def _read_part(config: Mapping[str, Any], tensors: Tensors, of: Architecture) -> Part:
    _check_known(of)
    if not isinstance(config.get("config"), dict) or not isinstance(config.get("name"), str):
        raise UserError("it lacks the adapter's config or name.")
    method = read_method(_as_trained(config), of)
    return Part(
        method,
        _cut(tensors, method, of),
        lambda model, task: adapterhub_slots(model, task, config["name"]),
    )


def _as_trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's options with the meaning they had in the library version that wrote them."""
    options, version = config["config"], str(config.get("version", ""))
    if not version and options.get("non_linearity") in _OLD_ACTIVATIONS:
        return options | {"non_linearity": _OLD_ACTIVATIONS[options["non_linearity"]]}
    if re.match(r"adapters\.(0|1\.0)\.", version) and options.get("architecture") == "lora":
        return options | {"alpha": options.get("r")}  # those versions used r as alpha: their #770
    return options


# ------------------------------------------------ their names


def adapterhub_slots(model: Model, task: int, name: str) -> Iterator[Slot]:
    """The table of names of one task's adapter, called `name`."""
    of = model.config
    for block, stack in of.stacks.items():
        for place in places(model.method, block):
            if not isinstance(place.part, Adapter):
                continue
            layers = place.adapter.layer_indices(stack.num_hidden_layers)
            if isinstance(place.adapter.form, Prefix):
                for pool in _prefix_pools(of):
                    prefix = f"{pool}.prefix_tunings.{name}.{_prefix_group(of, place)}"
                    yield from _prefix_slots(prefix, place, task, len(layers))
                continue
            for index, layer in enumerate(layers):
                yield from _layer_slots(_module(of, place, layer), name, place, task, index)


def _module(of: Architecture, place: Place, layer: int) -> str:
    """The module that holds an adapter."""
    if isinstance(of, BartConfig) and place.site in _BART_MODULES:
        return f"model.{place.block}.layers.{layer}.{_BART_MODULES[place.site]}"
    return huggingface.module(of, place, layer)


def _prefix_pools(of: Architecture) -> Iterator[str]:
    """The modules with the prefixes of all layers, of which each attention has a copy."""
    if not isinstance(of, BartConfig):
        yield "prefix_tuning"
        for layer in range(of.num_hidden_layers):
            yield f"encoder.layer.{layer}.attention.self.prefix_tuning.pool"
        return
    yield "model.prefix_tuning"
    for block, stack in of.stacks.items():
        for attention in ("self_attn", "encoder_attn")[: 1 + (block == "decoder")]:
            for layer in range(stack.num_hidden_layers):
                yield f"model.{block}.layers.{layer}.{attention}.prefix_tuning.pool"


def _prefix_group(of: Architecture, place: Place) -> str:
    """The library's name of the prefixes of an attention; those of an encoder alone are "self"."""
    if isinstance(of, BartConfig) and place.block == "encoder":
        return "encoder_prefix"
    return f"{place.attention}_prefix"


def _layer_slots(module: str, name: str, where: Place, task: int, place: int) -> Iterator[Slot]:
    """The slots of an adapter at one module of the model."""
    adapter, path, index = where.adapter, ("adapters", where.name, "layers"), (task, place)
    lora, bottleneck = f"{module}.loras.{name}", f"{module}.adapters.{name}"
    one = (task, slice(place, place + 1))  # their tensor has an axis of size 1
    match adapter.form:
        case Scale():
            yield Slot(f"{lora}.lora_B", (*path, "scale"), one, transpose=True)
        case Bottleneck(bias=False):
            yield from tables.lora(f"{lora}.lora_", path, index)
        case Bottleneck():
            yield from tables.dense(f"{bottleneck}.adapter_down.0", (*path, "down"), index)
            yield from tables.dense(f"{bottleneck}.adapter_up", (*path, "up"), index)
            if adapter.scale == "learned":
                yield Slot(f"{bottleneck}.scaling", (*path, "scale"), one)


def _prefix_slots(name: str, where: Place, task: int, count: int) -> Iterator[Slot]:
    """One copy of a prefix for `count` layers, flat or with its network."""
    path = ("adapters", where.name)
    if not where.adapter.shared:
        for place in range(count):
            for i, part in enumerate(("key", "value")):
                piece = f"{name}.control_trans[{2 * place + i}]"
                yield Slot(piece, (*path, "layers", part), (task, place))
        return
    yield Slot(f"{name}.wte.weight", (*path, "shared", "embedding"), (task,))
    yield from tables.dense(f"{name}.control_trans.0", (*path, "shared", "down"), (task,))
    for place in range(count):
        up, index = (*path, "layers", "up"), (task, place)
        yield from tables.dense(f"{name}.control_trans.2", up, index, f"[{place}]")


def _cut(tensors: Tensors, method: Method, of: Architecture) -> dict[str, np.ndarray]:
    """The tensors, with each prefix tensor of the expected size split into one piece per layer."""
    pieces = dict(tensors)
    for block, stack in of.stacks.items():
        for place in places(method, block):
            if not (isinstance(place.part, Adapter) and isinstance(place.adapter.form, Prefix)):
                continue
            count = len(place.adapter.layer_indices(stack.num_hidden_layers))
            group, size = (
                f".{_prefix_group(of, place)}.control_trans",
                2 * count * stack.hidden_size,
            )
            for name, tensor in tensors.items():
                if re.search(rf"{re.escape(group)}\.2\.\w+$", name) and len(tensor) == size:
                    parts = np.split(tensor, count)
                elif name.endswith(group) and not len(tensor) % size:
                    # [P, keys and values of the first layer, then of the second ..., D]
                    parts = [*np.moveaxis(tensor.reshape(-1, 2 * count, stack.hidden_size), 1, 0)]
                else:
                    continue
                del pieces[name]
                pieces |= tables.cut(name, parts)
    return pieces


def _join(tensors: Tensors) -> dict[str, np.ndarray]:
    """The inverse of `_cut`."""
    return {
        name: np.stack(pieces, axis=1).reshape(-1)
        if name.endswith(".control_trans")
        else np.concatenate(pieces)
        for name, pieces in tables.gathered(tensors).items()
    }
