"""Adapters as AdapterHub's library (`adapters`) saves them, in and out.

A directory holds `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`, without
the encoder. The network behind a prefix, or a flat prefix itself, makes the keys and values of all
layers at once; in the tables here it is cut into pieces, the layers' own ("control_trans.2[0]").
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
from pals_jax.models import task_axis
from pals_jax.models.adapters.forms import Bottleneck, Prefix, Scale
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

_VERSION = "adapters.1.3.0"  # whose format is written
_SAFETENSORS, _PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
# Every layer's copy of the one prefix; only some versions of the library save them.
_PREFIX_COPIES = r"encoder\.layer\.\d+\.attention\.self\.prefix_tuning\.pool\."
# What activations were called before the library wrote its version.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

_log = logging.getLogger(__name__)


def from_adapterhub(
    base_dir: str | Path, adapters: Mapping[str, str | Path]
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """A model with one task for each adapter, in their order, around one encoder.

    Heads are not read: the library saves them apart (`head_config.json`), and they need not be of
    our kind. Each task gets a new one with two outputs, to be trained; where a directory holds a
    head, a warning says so.

    Args:
        base_dir: the encoder that the adapters were trained on; a directory, the id of a repository
            on the hub, or whatever else `from_huggingface` takes.
        adapters: by name of the task, a directory with `adapter_config.json` and
            `adapter.safetensors` or `pytorch_adapter.bin`; the latter needs PyTorch.

    Returns:
        The model, and its variables {"params", "adapters"} with float32 leaves.

    Raises:
        UserError: a method that is not held here, methods that differ, a damaged file, or tensors
            that do not fit; all are listed.
    """
    for directory in map(Path, adapters.values()):
        _look_around(directory)
    weights = _SAFETENSORS, _PICKLE
    return stacking.stack(base_dir, adapters, weights, _read_part, may_lack=_PREFIX_COPIES)


def to_adapterhub(
    model: MultiTaskModel, variables: Mapping[str, Any], task_index: int, directory: str | Path
) -> None:
    """Writes one task's adapter, without its head, as the library's `load_adapter` reads it.

    Args:
        model: the model.
        variables: its variables.
        task_index: the task.
        directory: where to; made if need be. Its name is the adapter's.

    Raises:
        UserError: there is no such task, or the library has no such method.
    """
    task_axis.check(len(model.num_outputs), task_index)
    path = Path(directory).resolve()
    name = path.name.replace(".", "_")  # a dot would part the names of modules
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
    """What else the library may have saved there."""
    if (directory / "adapter_fusion_config.json").exists():
        raise UserError(
            f"{directory} holds an AdapterFusion, which is not held here; give the directories of"
            " single adapters."
        )
    if (directory / "head_config.json").exists():
        _log.warning(
            "the head in %s is not read; a new one with two outputs is initialised.", directory
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
    """The adapter's options as the version of the library that wrote them understood them."""
    options, version = config["config"], str(config.get("version", ""))
    if not version and options.get("non_linearity") in _OLD_ACTIVATIONS:
        return options | {"non_linearity": _OLD_ACTIVATIONS[options["non_linearity"]]}
    if re.match(r"adapters\.(0|1\.0)\.", version) and options.get("architecture") == "lora":
        return options | {"alpha": options.get("r")}  # which was taken for alpha: their #770
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
    """The part of an adapter that hangs on one module of the encoder."""
    path, index = ("adapters", adapter.name, "layers"), (task, place)
    lora, bottleneck = f"{module}.loras.{name}", f"{module}.adapters.{name}"
    one = (task, slice(place, place + 1))  # theirs has an axis of one element
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
    """The tensors with those of all layers' prefixes in pieces, if they are as long as they say."""
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
