"""Import and export of adapters in the format of AdapterHub's library (`adapters`).

A directory holds `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`, without
the encoder. A prefix tensor there covers the keys and values of all layers; the tables here split
it into one piece per layer ("control_trans.2[0]").
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pals_jax.convert import stacking, tables, tensor_files
from pals_jax.convert.adapterhub_config import read_method, write_method
from pals_jax.convert.stacking import Part
from pals_jax.convert.tables import Slot, Tensors
from pals_jax.models.adapters.forms import Bottleneck, Prefix, Scale
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.task_rows import check_task_ids
from pals_jax.runtime.errors import UserError

_VERSION = "adapters.1.3.0"  # the version whose format is written
_SAFETENSORS, _PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
# Per-layer copies of the one prefix, which only some versions of the library save.
_PREFIX_COPIES = r"encoder\.layer\.\d+\.attention\.self\.prefix_tuning\.pool\."
# Names of activations in files that predate the version field.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

_log = logging.getLogger(__name__)


def from_adapterhub(
    base_dir: str | Path, adapters: Mapping[str, str | Path]
) -> tuple[Any, dict[str, Any]]:
    """A model with one task per adapter, in the given order, on one encoder.

    Heads are not read: the library saves them separately (`head_config.json`) and allows kinds that
    this package does not have. Each task gets a new, untrained head with two outputs; a warning is
    logged if a directory contains a head.

    Args:
        base_dir: the encoder that the adapters were trained on; a directory, a hub id, or anything
            else that `from_huggingface` accepts.
        adapters: maps each task name to a directory with `adapter_config.json` and
            `adapter.safetensors` or `pytorch_adapter.bin`; the latter needs PyTorch.

    Returns:
        The model, and its variables {"params", "adapters"} with float32 leaves.

    Raises:
        UserError: if a method is not supported, the methods differ, a file is damaged, or tensors
            do not fit; every problem is listed.
    """
    for directory in map(Path, adapters.values()):
        _look_around(directory)
    weights = _SAFETENSORS, _PICKLE
    return stacking.stack(base_dir, adapters, weights, _read_part, may_lack=_PREFIX_COPIES)


def to_adapterhub(
    model: MultiTaskModel, variables: Mapping[str, Any], task_index: int, directory: str | Path
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
    check_task_ids(len(model.num_outputs), task_index)
    path = Path(directory).resolve()
    name = path.name.replace(".", "_")  # PyTorch module names must not contain dots
    config = {
        "config": write_method(model.method, model.config),
        "hidden_size": model.config.hidden_size,
        "model_class": {"bert": "BertModel", "roberta": "RobertaModel"}[model.config.model_type],
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


def _read_part(config: Mapping[str, Any], tensors: Tensors, encoder: BertConfig) -> Part:
    if not isinstance(config.get("config"), dict) or not isinstance(config.get("name"), str):
        raise UserError("it lacks the adapter's config or name.")
    method = read_method(_as_trained(config), encoder)
    return Part(
        method,
        _cut(tensors, method, encoder),
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


def adapterhub_slots(model: MultiTaskModel, task: int, name: str) -> Iterator[Slot]:
    """The table of names of one task's adapter, called `name`."""
    depth = model.config.num_hidden_layers
    for adapter in (spec for spec in model.method if isinstance(spec, Adapter)):
        layers = adapter.layer_indices(depth)
        if isinstance(adapter.form, Prefix):
            group = f"prefix_tunings.{name}.self_prefix"
            yield from _prefix_slots(f"prefix_tuning.{group}", adapter, task, len(layers))
            for layer in range(depth):
                copy = f"encoder.layer.{layer}.attention.self.prefix_tuning.pool.{group}"
                yield from _prefix_slots(copy, adapter, task, len(layers))
            continue
        for place, layer in enumerate(layers):
            module = f"encoder.layer.{layer}.{tables.MODULES[adapter.site]}"
            yield from _layer_slots(module, name, adapter, task, place)


def _layer_slots(module: str, name: str, adapter: Adapter, task: int, place: int) -> Iterator[Slot]:
    """The slots of an adapter at one module of the encoder."""
    path, index = ("adapters", adapter.name, "layers"), (task, place)
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


def _prefix_slots(name: str, adapter: Adapter, task: int, count: int) -> Iterator[Slot]:
    """One copy of a prefix for `count` layers, flat or with its network."""
    path = ("adapters", adapter.name)
    if not adapter.shared:
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


def _cut(tensors: Tensors, method: Method, encoder: BertConfig) -> dict[str, np.ndarray]:
    """The tensors, with each prefix tensor of the expected size split into one piece per layer."""
    pieces = dict(tensors)
    for adapter in method:
        if not (isinstance(adapter, Adapter) and isinstance(adapter.form, Prefix)):
            continue
        count, width = len(adapter.layer_indices(encoder.num_hidden_layers)), encoder.hidden_size
        for name, tensor in tensors.items():
            if re.search(r"\.control_trans\.2\.\w+$", name) and len(tensor) == 2 * count * width:
                parts = np.split(tensor, count)
            elif re.search(r"\.control_trans$", name) and not len(tensor) % (2 * count * width):
                # [P, keys and values of the first layer, then of the second ..., D]
                parts = [*np.moveaxis(tensor.reshape(-1, 2 * count, width), 1, 0)]
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
