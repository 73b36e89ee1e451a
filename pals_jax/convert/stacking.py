"""Adapters of several tasks, each from a directory of its own, stacked onto one encoder."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pals_jax.convert import huggingface, tables
from pals_jax.convert.tables import Slot
from pals_jax.errors import UserError
from pals_jax.models.adapters import Method
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel


@dataclasses.dataclass(frozen=True)
class Part:
    """What a directory holds of one task.

    Attributes:
        source: the directory.
        method: what the adapter is.
        tensors: by foreign name.
        slots: for a model and a task index, the places of the tensors.
        num_outputs: of the task's head.
    """

    source: Path
    method: Method
    tensors: Mapping[str, np.ndarray]
    slots: Callable[[MultiTaskModel, int], Iterable[Slot]]
    num_outputs: int = 2


def stack(
    base_dir: str | Path,
    directories: Mapping[str, str | Path],
    read_part: Callable[[Path, BertConfig], Part],
    may_lack: str = "$^",
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """One task for each adapter, in their order, on the encoder in a directory.

    Args:
        base_dir: anything that `huggingface.resolve` takes.
        directories: those of the adapters, by name of the task.
        read_part: reads one of them, given the encoder's architecture.
        may_lack: pattern of the tensors that an adapter may lack.

    Returns:
        The model, and its variables {"params", "adapters"} with float32 leaves.

    Raises:
        UserError: no adapter, adapters of different methods, or tensors that do not fit.
    """
    if not directories:
        raise UserError("there is no adapter to convert; give the directory of at least one.")
    base = huggingface.resolve(base_dir)
    config = huggingface.read_config(base)
    parts = {task: read_part(Path(path), config) for task, path in directories.items()}
    num_outputs = tuple(part.num_outputs for part in parts.values())
    model = MultiTaskModel(config, num_outputs, _common_method(parts))
    slots = list(tables.bert(config))
    tensors = tables.write(huggingface.from_huggingface(base)[1], slots)
    for task, part in enumerate(parts.values()):
        where = f"{part.source}: "  # so that an error says whose tensor it is
        slots += tables.renamed(part.slots(model, task), where.__add__)
        tensors |= {where + name: tensor for name, tensor in part.tensors.items()}
    may_lack = f".*: (?:{may_lack})"
    return model, tables.read(model, slots, tensors, source="an adapter", may_lack=may_lack)


def check_task(model: MultiTaskModel, task: int) -> None:
    """Refuses a task that the model does not have."""
    count = len(model.num_outputs)
    if not 0 <= task < count:
        raise UserError(f"task {task} does not exist; the model's {count} are 0 to {count - 1}.")


def _common_method(parts: Mapping[str, Part]) -> Method:
    (first, part), *rest = parts.items()
    for other, another in rest:
        if another.method != part.method:
            raise UserError(
                f"the adapters of {first} ({part.source}) and {other} ({another.source}) differ in"
                " method, size or layers; one model holds what agrees, so convert them separately."
            )
    return part.method
