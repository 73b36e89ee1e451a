"""Task files: one file with everything that a task adds to a base.

A safetensors file with the task's rows of the `adapters` collection (adapters, copies of the
base's parameters, head). Its metadata hold the task, its method, the base's architecture, and
fingerprints of the base's weights and tokenizer. Any set of task files with one method makes a
model.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from pals_jax.convert.tensor_files import write_tensors
from pals_jax.data.pairs import PairTokenizer
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import FastTokenizer
from pals_jax.models.adapters import serialize
from pals_jax.models.adapters.parse import parse_method
from pals_jax.models.adapters.spec import Method
from pals_jax.models.architectures import Architecture, Model, new_model
from pals_jax.models.bart import BartConfig
from pals_jax.models.shapes import variable_shapes
from pals_jax.models.task_axis import append
from pals_jax.runtime.errors import UserError, reason

_FORMAT = "pals_jax task, version 2"
_FORMATS = {_FORMAT, "pals_jax task, version 1"}  # version 1 has the method as an expression
_FINGERPRINTS = ("base", "tokenizer")
# What parsers raise; the last two of texts that are nested too deep.
_DAMAGE = (ValueError, TypeError, AttributeError, KeyError, RecursionError, MemoryError)
_LENGTHS = ("max_length", "max_target_length")
_KEYS = {"task", "method", "max_length", "architecture", *_FINGERPRINTS}


@dataclasses.dataclass(frozen=True)
class Base:
    """The encoder or encoder-decoder to which tasks are added.

    Attributes:
        architecture: its architecture.
        params: its weights, the `params` collection.
        tokenizer: its tokenizer.
    """

    architecture: Architecture
    params: Any
    tokenizer: FastTokenizer | PairTokenizer

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the weights (names, shapes, float32 bytes) and of the tokenizer."""
        weights = hashlib.sha256()
        for path, leaf in sorted(flatten_dict(self.params, sep="/").items()):
            weights.update(f"{path} {leaf.shape}".encode())
            weights.update(np.asarray(leaf, np.float32).tobytes())
        if isinstance(self.tokenizer, PairTokenizer):
            content = self.tokenizer.content
        else:
            content = self.tokenizer.backend_tokenizer.to_str()
        tokenizer = hashlib.sha256(content.encode())
        return {"base": weights.hexdigest(), "tokenizer": tokenizer.hexdigest()}


def save(
    path: Path,
    base: Base,
    task: Task,
    method: Method,
    max_lengths: Mapping[str, int],
    adapters: Mapping[str, Any],
    index: int,
) -> None:
    """Writes one task of a model.

    Args:
        path: the file.
        base: the encoder or encoder-decoder of the model.
        task: the task.
        method: the method of the model.
        max_lengths: the numbers of tokens to which texts were truncated: "max_length", and
            "max_target_length" if its answers are texts.
        adapters: the `adapters` collection, leaves [T, ...].
        index: the task's index on the task axis.
    """
    rows = flatten_dict(jax.tree.map(lambda x: x[index], dict(adapters)), sep="/")
    for leaf in rows.keys() & {"head/kernel", "head/bias"}:
        rows[leaf] = rows[leaf][..., : task.num_outputs]
    metadata = {
        "format": _FORMAT,
        "task": json.dumps(dataclasses.asdict(task)),
        "method": serialize.dumps(method),
        **{name: str(length) for name, length in max_lengths.items()},
        "architecture": json.dumps(dataclasses.asdict(base.architecture)),
        **base.fingerprints,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: np.asarray(x) for name, x in rows.items()}, metadata)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Several task files on one base.

    Attributes:
        variables: the variables of the combined model.
        tasks: the tasks in the order of the files.
        method: their common method.
        max_lengths: the largest of the files, in tokens, by name; see `save`.
    """

    variables: dict[str, Any]
    tasks: tuple[Task, ...]
    method: Method
    max_lengths: Mapping[str, int]


def is_task_file(path: Path) -> bool:
    """Whether a file says of itself that it is a task file, of any version; it may be damaged."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return str((file.metadata() or {}).get("format")).startswith("pals_jax task")
    except (OSError, safetensors.SafetensorError):
        return False


def load(paths: Sequence[Path], base: Base) -> Loaded:
    """The model of several task files on one base.

    Raises:
        UserError: if a file is not a task file or is damaged, holds a value that is not finite,
            belongs to another base or tokenizer, or has another method than the first, or if two
            tasks have the same name.
    """
    files = [_read(path) for path in paths]
    method = files[0].method
    for file in files:
        for what, mine in base.fingerprints.items():
            if file.fingerprints[what] != mine:
                raise UserError(
                    f"{file.path} was trained on another {what}; use the one it was trained on."
                )
        if file.method != method:
            theirs, ours = (" + ".join(part.name for part in x) for x in (file.method, method))
            raise UserError(
                f"{file.path} has another method ({theirs}) than {paths[0]} ({ours}), or the same"
                " in other sizes; tasks of one model share a method."
            )
    names = [file.task.name for file in files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two files hold a task named {repeated[0]!r}; leave one out.")
    adapters: Any = None
    for file in files:
        _check_kind(file, base)
        model = new_model(base.architecture, (file.task.num_outputs,), method)
        _check_tensors(file.path, model, file.tensors)
        row = unflatten_dict({k: x[None] for k, x in file.tensors.items()}, sep="/")
        adapters = row if adapters is None else append(adapters, row)
    return Loaded(
        {"params": base.params, "adapters": adapters},
        tuple(file.task for file in files),
        method,
        {name: max(each.max_lengths[name] for each in files) for name in files[0].max_lengths},
    )


def load_another(path: Path, base: Base, method: Method) -> Loaded:
    """The task of a file, for a run that has tasks already.

    Args:
        path: the file.
        base: the encoder of the run.
        method: the method of the run.

    Raises:
        UserError: as for `load`, or if the run has another method.
    """
    loaded = load([path], base)
    if loaded.method != method:
        theirs, ours = (" + ".join(part.name for part in x) for x in (loaded.method, method))
        raise UserError(
            f"{path} has another method ({theirs}) than the run ({ours}), or the same in other"
            " sizes; tasks of one run share a method."
        )
    return loaded


@dataclasses.dataclass(frozen=True)
class _File:
    """What one file holds; `fingerprints` are of its base, as `Base.fingerprints`."""

    path: Path
    tensors: dict[str, np.ndarray]
    task: Task
    method: Method
    max_lengths: dict[str, int]
    fingerprints: dict[str, str]


def _read(path: Path) -> _File:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read the task file {path}: {error}.") from error
    if metadata.get("format") not in _FORMATS or _KEYS - set(metadata):
        raise UserError(
            f"{path} is not a task file of this version; write it with pals-jax convert."
        )
    try:
        task = Task.from_json(json.loads(metadata["task"]))
        task.check()
        names = _LENGTHS if task.output == "text" else _LENGTHS[:1]
        lengths = {name: int(metadata[name]) for name in names}
        method = parse_method(metadata["method"])
    except (*_DAMAGE, UserError) as error:
        raise UserError(
            f"the metadata of {path} are damaged ({reason(error)}); get the file again."
        ) from error
    return _File(path, tensors, task, method, lengths, {k: metadata[k] for k in _FINGERPRINTS})


def _check_kind(file: _File, base: Base) -> None:
    """Refuses a task with texts for answers on an encoder, and one without on an encoder-decoder.

    The fingerprints tell the two apart; a file that somebody has changed may not.
    """
    if (file.task.output == "text") != isinstance(base.architecture, BartConfig):
        raise UserError(
            f"{file.path} holds a task that is answered with {file.task.output}, which is not what"
            " its base gives; get the file again."
        )


def _check_tensors(path: Path, model: Model, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses tensors that are not exactly the rows of one task, all finite."""
    shapes = variable_shapes(model)["adapters"]
    wanted = {name: (x.shape[1:], x.dtype) for name, x in flatten_dict(shapes, sep="/").items()}
    found = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    if wrong := sorted(k for k in wanted | found if wanted.get(k) != found.get(k)):
        raise UserError(
            f"{path} does not fit its method; missing, unknown or of a wrong shape:"
            f" {', '.join(wrong)}. Write it again with pals-jax convert."
        )
    if wrong := sorted(name for name, x in tensors.items() if not np.isfinite(x).all()):
        raise UserError(
            f"{path} holds values that are not finite, in {', '.join(wrong)}; its training has"
            " diverged, or the file is damaged."
        )
