"""Combines adapters of several tasks, one directory each, on one model."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pals_jax.convert import huggingface, tables, tensor_files
from pals_jax.convert.tables import Slot, Tensors
from pals_jax.models.adapters.spec import Method
from pals_jax.models.architectures import Architecture, Model, new_model
from pals_jax.runtime.errors import UserError

_NESTED = r"^(base_model\.model\.)?(bert\.|roberta\.)?"  # prefixes before a name in the model


@dataclasses.dataclass(frozen=True)
class Part:
    """One task, as read from a directory.

    Attributes:
        method: the method of the adapter.
        tensors: the tensors by their foreign names.
        slots: a function from a model and a task index to the table of the tensors.
        num_outputs: the number of outputs of the task's head.
    """

    method: Method
    tensors: Tensors
    slots: Callable[[Any, int], Iterable[Slot]]
    num_outputs: int = 2


ReadPart = Callable[[Mapping[str, Any], Tensors, Any], Part]


def stack(
    base_dir: str | Path,
    directories: Mapping[str, str | Path],
    weights: tuple[str, ...],
    read_part: ReadPart,
    may_lack: str = "$^",
) -> tuple[Model, dict[str, Any]]:
    """A model with one task per adapter, in the given order, on one encoder or encoder-decoder.

    Args:
        base_dir: anything that `huggingface.resolve` accepts.
        directories: the adapters' directories by task name; each holds `adapter_config.json`.
        weights: the possible names of the tensor file.
        read_part: a function from the configuration, the tensors and the model's architecture to a
            `Part`. The tensors' names are relative to the encoder, or to the encoder-decoder with
            its words.
        may_lack: a pattern of tensors that an adapter may lack.

    Returns:
        The model, and its variables {"params", "adapters"} with float32 leaves.

    Raises:
        UserError: if there is no adapter, a file is damaged, the adapters' methods differ, or
            tensors do not fit.
    """
    if not directories:
        raise UserError("there is no adapter to convert; give the directory of at least one.")
    base = huggingface.resolve(base_dir)
    config = huggingface.architecture(base)
    parts = {
        task: _read(Path(directory), weights, read_part, config)
        for task, directory in directories.items()
    }
    num_outputs = tuple(part.num_outputs for part in parts.values())
    model = new_model(config, num_outputs, _common_method(parts, directories))
    slots = list(huggingface.slots(config))
    tensors = tables.write(huggingface.from_huggingface(base)[1], slots)
    for index, (task, part) in enumerate(parts.items()):
        where = f"{directories[task]}: "  # lets error messages name the directory of a tensor
        slots += tables.renamed(part.slots(model, index), where.__add__)
        tensors |= {where + name: tensor for name, tensor in part.tensors.items()}
    may_lack = f".*: (?:{may_lack})"
    return model, tables.read(model, slots, tensors, source="an adapter", may_lack=may_lack)


def _read(directory: Path, weights: tuple[str, ...], read_part: ReadPart, of: Architecture) -> Part:
    path = directory / "adapter_config.json"
    config, tensors = tensor_files.read_json(path), tensor_files.find_tensors(directory, *weights)
    try:
        return read_part(config, {re.sub(_NESTED, "", k): x for k, x in tensors.items()}, of)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _common_method(parts: Mapping[str, Part], directories: Mapping[str, str | Path]) -> Method:
    (first, part), *rest = parts.items()
    for other, another in rest:
        if another.method != part.method:
            raise UserError(
                f"the adapters of {first} ({directories[first]}) and {other} ({directories[other]})"
                " differ in method, size or layers; all tasks of a model share a method, so convert"
                " them separately."
            )
    return part.method
