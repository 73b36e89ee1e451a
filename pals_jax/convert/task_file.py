"""One task as one file: what it adds to a base, and all that is needed to use it there.

A safetensors file with the task's rows of the `adapters` collection (adapters, copies of encoder
parameters, head), and as metadata the task, its method, the base's architecture, and fingerprints
of the base's weights and of its tokenizer. Any set of them, of one method, makes a model.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from pals_jax.convert.tensor_files import write_tensors
from pals_jax.data.tasks import Task
from pals_jax.models.adapters.parse import parse_method
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, variable_shapes
from pals_jax.models.task_axis import append
from pals_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = "pals_jax task, version 1"
_KEYS = {"task", "method", "max_length", "architecture", "base", "tokenizer"}


@dataclasses.dataclass(frozen=True)
class Base:
    """What a task is added to.

    Attributes:
        architecture: of the encoder.
        params: its weights, the `params` collection.
        tokenizer: its tokenizer.
    """

    architecture: BertConfig
    params: Any
    tokenizer: "PreTrainedTokenizerFast"

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the weights (names, shapes, float32 bytes) and of the tokenizer."""
        weights = hashlib.sha256()
        for path, leaf in sorted(flatten_dict(self.params, sep="/").items()):
            weights.update(f"{path} {leaf.shape}".encode())
            weights.update(np.asarray(leaf, np.float32).tobytes())
        tokenizer = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        return {"base": weights.hexdigest(), "tokenizer": tokenizer.hexdigest()}


def save(
    path: Path,
    base: Base,
    task: Task,
    method: str,
    max_length: int,
    adapters: Mapping[str, Any],
    index: int,
) -> None:
    """Writes one task of a model.

    Args:
        path: the file.
        base: what the model is built on.
        task: the task.
        method: the expression that `methods.parse` reads.
        max_length: the tokens at which its texts were cut.
        adapters: the `adapters` collection, leaves [T, ...].
        index: the task's row in it.
    """
    rows = flatten_dict(jax.tree.map(lambda x: x[index], dict(adapters)), sep="/")
    for leaf in ("head/kernel", "head/bias"):
        rows[leaf] = rows[leaf][..., : task.num_outputs]
    metadata = {
        "format": _FORMAT,
        "task": json.dumps(dataclasses.asdict(task)),
        "method": method,
        "max_length": str(max_length),
        "architecture": json.dumps(dataclasses.asdict(base.architecture)),
        **base.fingerprints(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: np.asarray(x) for name, x in rows.items()}, metadata)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Several task files on one base.

    Attributes:
        variables: of their model.
        tasks: in the order of the files.
        method: the expression of their method.
        max_length: the largest of theirs.
    """

    variables: dict[str, Any]
    tasks: tuple[Task, ...]
    method: str
    max_length: int


def load(paths: Sequence[Path], base: Base) -> Loaded:
    """The model of several task files on one base.

    Raises:
        UserError: no task file, a damaged one, one of another base, tokenizer or method, or two of
            one name.
    """
    read = [_read(path) for path in paths]
    for path, (_, metadata) in zip(paths, read, strict=True):
        for what, mine in base.fingerprints().items():
            if metadata[what] != mine:
                raise UserError(
                    f"{path} was trained on another {what}; load it onto the one it was made with."
                )
        if parse_method(metadata["method"]) != parse_method(read[0][1]["method"]):
            raise UserError(
                f"{path} has the method {metadata['method']}, {paths[0]} has"
                f" {read[0][1]['method']}; tasks of one model share a method."
            )
    tasks = tuple(Task.from_json(json.loads(metadata["task"])) for _, metadata in read)
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two of the files hold a task named {repeated[0]!r}; leave one out.")
    method = read[0][1]["method"]
    model = MultiTaskModel(
        base.architecture, tuple(task.num_outputs for task in tasks), parse_method(method)
    )
    adapters: Any = None
    for path, task, (tensors, _) in zip(paths, tasks, read, strict=True):
        _check_tensors(path, model.clone(num_outputs=(task.num_outputs,)), tensors)
        row = unflatten_dict({k: jnp.asarray(x)[None] for k, x in tensors.items()}, sep="/")
        adapters = row if adapters is None else append(adapters, row)
    max_length = max(int(metadata["max_length"]) for _, metadata in read)
    return Loaded({"params": base.params, "adapters": adapters}, tasks, method, max_length)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read the task file {path}: {error}.") from error
    if metadata.get("format") != _FORMAT or _KEYS - set(metadata):
        raise UserError(f"{path} is no task file of this version; write it with pals-jax convert.")
    return tensors, metadata


def _check_tensors(path: Path, model: MultiTaskModel, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses what is not just the row of one task."""
    shapes = variable_shapes(model)["adapters"]
    wanted = {name: x.shape[1:] for name, x in flatten_dict(shapes, sep="/").items()}
    found = {name: x.shape for name, x in tensors.items()}
    if wrong := sorted(k for k in wanted | found if wanted.get(k) != found.get(k)):
        raise UserError(
            f"{path} does not fit its method: missing, unknown or of another shape are"
            f" {', '.join(wrong)}; write it again with pals-jax convert."
        )
