"""Foreign checkpoints as tables of tensor names, with one function to read and one to write."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pals_jax.models.adapters.places import places
from pals_jax.models.adapters.spec import TaskCopy
from pals_jax.models.architectures import Model, num_tasks
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.models.shapes import variable_shapes
from pals_jax.runtime.errors import UserError

Path = tuple[str, ...]
Tensors = Mapping[str, np.ndarray]

# For each site, the module of Hugging Face's `BertLayer` that outputs the state there.
MODULES: Mapping[str, str] = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.projection": "attention.output.dense",
    "attention.output": "attention.output",
    "ffn.intermediate": "intermediate.dense",
    "ffn.projection": "output.dense",
    "ffn.output": "output",
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One foreign tensor and its place in `variables`.

    Attributes:
        name: the tensor's foreign name.
        path: the leaf, for example ("params", "encoder", "layers", "ffn", "output", "kernel").
        index: the part of the leaf, for example (3,) for the fourth layer; None adds an axis.
        transpose: whether to transpose, since PyTorch stores kernels as [out, in], Flax as
            [in, out].
    """

    name: str
    path: Path
    index: tuple[int | slice | None, ...] = ()
    transpose: bool = False


def dense(
    name: str, path: Path, index: tuple[int | slice, ...] = (), piece: str = ""
) -> Iterator[Slot]:
    """The two tensors of a `torch.nn.Linear`, or one piece of each, such as "[3]"; see `cut`."""
    yield Slot(f"{name}.weight{piece}", (*path, "kernel"), index, transpose=True)
    yield Slot(f"{name}.bias{piece}", (*path, "bias"), index)


def norm(name: str, path: Path, index: tuple[int | slice, ...] = ()) -> Iterator[Slot]:
    """The two tensors of a layer norm."""
    yield Slot(f"{name}.weight", (*path, "scale"), index)
    yield Slot(f"{name}.bias", (*path, "bias"), index)


def bert(config: BertConfig) -> Iterator[Slot]:
    """The encoder under the names of Hugging Face's `BertModel`."""
    root = ("params", "encoder")
    embeddings = (*root, "embeddings")
    for name in ("word", "position", "token_type"):
        yield Slot(f"embeddings.{name}_embeddings.weight", (*embeddings, name, "embedding"))
    yield from norm("embeddings.LayerNorm", (*embeddings, "norm"))
    for i in range(config.num_hidden_layers):
        yield from bert_layer(f"encoder.layer.{i}", (*root, "layers"), (i,))
    yield from dense("pooler.dense", (*root, "pooler", "dense"))


def bert_layer(name: str, path: Path, index: tuple[int | slice, ...]) -> Iterator[Slot]:
    """One layer under the names of Hugging Face's `BertLayer`."""
    for projection in ("query", "key", "value"):
        theirs = f"{name}.attention.self.{projection}"
        yield from dense(theirs, (*path, "attention", projection), index)
    output = f"{name}.attention.output"
    yield from dense(f"{output}.dense", (*path, "attention", "output"), index)
    yield from norm(f"{output}.LayerNorm", (*path, "attention_norm"), index)
    yield from dense(f"{name}.intermediate.dense", (*path, "ffn", "intermediate"), index)
    yield from dense(f"{name}.output.dense", (*path, "ffn", "output"), index)
    yield from norm(f"{name}.output.LayerNorm", (*path, "ffn_norm"), index)


def head(name: str, task: int, outputs: int) -> Iterator[Slot]:
    """A task's head, a `torch.nn.Linear` with its own number of outputs."""
    columns, path = slice(outputs), ("adapters", "head")
    yield Slot(f"{name}.weight", (*path, "kernel"), (task, slice(None), columns), True)
    yield Slot(f"{name}.bias", (*path, "bias"), (task, columns))


def lora(name: str, path: Path, index: tuple[int | slice, ...], suffix: str = "") -> Iterator[Slot]:
    """The two matrices of LoRA on one projection: "nameA" and "nameB", followed by the suffix."""
    yield Slot(f"{name}A{suffix}", (*path, "down", "kernel"), index, transpose=True)
    yield Slot(f"{name}B{suffix}", (*path, "up", "kernel"), index, transpose=True)


def renamed(slots: Iterable[Slot], rename: Callable[[str], str]) -> Iterator[Slot]:
    """The same slots with other foreign names."""
    return (dataclasses.replace(slot, name=rename(slot.name)) for slot in slots)


def cut(name: str, pieces: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The pieces of a foreign tensor that fills several slots, named "name[0]", "name[1]", ..."""
    return {f"{name}[{i}]": piece for i, piece in enumerate(pieces)}


def gathered(tensors: Tensors) -> dict[str, list[np.ndarray]]:
    """The inverse of `cut`: for each name, the tensor's pieces in order, or the whole tensor."""
    whole: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        whole.setdefault(re.sub(r"\[\d+\]$", "", name), []).append(tensor)
    return whole


def read(
    model: Model,
    slots: Iterable[Slot],
    tensors: Tensors,
    *,
    source: str,
    seed: int = 0,
    may_lack: str = "$^",
    may_ignore: str = "$^",
) -> dict[str, Any]:
    """The model's variables, float32, with every slot filled from `tensors`.

    Several tensors may fill the same place (copies of a shared matrix) if they are equal. Leaves
    that no tensor fills get random initial values.

    Args:
        model: the model.
        slots: the table of names.
        tensors: the foreign checkpoint.
        source: the name of the checkpoint in error messages.
        seed: the seed of the initial values.
        may_lack: a pattern of slots that the checkpoint may lack.
        may_ignore: a pattern of tensors that may remain unused.

    Raises:
        UserError: if tensors are missing, unused, contradictory or of a wrong shape; the message
            lists them all.
    """
    shapes = flatten_dict(variable_shapes(model))
    leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    given = {path: np.zeros(leaf.shape, bool) for path, leaf in shapes.items()}
    filled: dict[tuple[Path, str], np.ndarray] = {}
    problems = []
    names = set()
    for slot in slots:
        names.add(slot.name)
        if slot.name not in tensors:
            if not re.match(may_lack, slot.name):
                problems.append(f"missing {slot.name}")
            continue
        tensor = np.asarray(tensors[slot.name], np.float32)
        tensor = tensor.T if slot.transpose else tensor
        place = leaves[slot.path][slot.index]
        if tensor.shape != place.shape:
            wanted = place.shape[::-1] if slot.transpose else place.shape
            problems.append(f"{slot.name} is {tensors[slot.name].shape} and not {wanted}")
            continue
        before = filled.setdefault((slot.path, str(slot.index)), tensor)
        if not np.array_equal(before, tensor):
            problems.append(f"{slot.name} differs from another copy of the same matrix")
        leaves[slot.path][slot.index] = tensor
        given[slot.path][slot.index] = True
    unused = sorted(name for name in set(tensors) - names if not re.match(may_ignore, name))
    problems += [f"unused {name}" for name in unused]
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}.")
    if isinstance(model, MultiTaskModel):
        for task, outputs in enumerate(model.num_outputs):  # the padding of heads stays zero
            for leaf in ("kernel", "bias"):
                given["adapters", "head", leaf][task, ..., outputs:] = True
    new = [path for path, mask in given.items() if not mask.all()]
    variables = jax.tree.map(jnp.asarray, leaves)
    variables |= {
        path: jnp.where(given[path], variables[path], x)
        for path, x in _initial(model, new, seed).items()
    }
    return unflatten_dict(variables | _owned(model, variables, new))


def _initial(model: Model, paths: Iterable[Path], seed: int) -> dict[Path, jax.Array]:
    """Random initial values of some leaves; jit drops the computation of all others."""

    @jax.jit
    def init(key: jax.Array) -> dict[Path, jax.Array]:
        variables = flatten_dict(init_variables(model, key))
        return {path: variables[path] for path in paths}

    return init(jax.random.key(seed))


def _owned(
    model: Model, variables: Mapping[Path, jax.Array], new: Iterable[Path]
) -> dict[Path, jax.Array]:
    """The leaves among `new` that are initialised as copies of the model's own parameters."""
    params = unflatten_dict({p[1:]: x for p, x in variables.items() if p[0] == "params"})
    copies = {
        ("adapters", place.name, *path): x
        for block, config in model.config.stacks.items()
        for place in places(model.method, block)
        if isinstance(place.part, TaskCopy)
        for path, x in flatten_dict(
            place.part.copies(params[block], config.num_hidden_layers, num_tasks(model))
        ).items()
    }
    return {path: copies[path] for path in new if path in copies}


def write(variables: Mapping[str, Any], slots: Iterable[Slot]) -> dict[str, np.ndarray]:
    """The foreign tensors of all slots, float32."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables).items()}
    tensors = {slot.name: (leaves[slot.path][slot.index], slot) for slot in slots}
    return {name: x.T if slot.transpose else x for name, (x, slot) in tensors.items()}
