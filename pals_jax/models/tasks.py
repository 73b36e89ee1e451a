"""The task axis as what it is: choosing, ordering and adding tasks are indexing and concatenation.

They take the `adapters` collection, whose leaves lead with a task axis. Only the head's width
depends on the other tasks: it is padded with zeros to the largest number of outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.errors import UserError
from pals_jax.models.adapters import Method
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel

Adapters = Mapping[str, Any]


def take(adapters: Adapters, num_outputs: Sequence[int], tasks: Sequence[int]) -> dict[str, Any]:
    """The rows of `tasks`, in that order, with heads as wide as these need; bit for bit.

    Args:
        adapters: leaves [T, ...].
        num_outputs: of each of the T tasks.
        tasks: indices; some may be left out, and the order may be another.

    Raises:
        UserError: there is no such task.
    """
    if wrong := [task for task in tasks if not 0 <= task < len(num_outputs)]:
        raise UserError(
            f"task id {wrong[0]} is out of range; the tasks are 0 to {len(num_outputs) - 1}."
        )
    rows = jax.tree.map(lambda x: x[jnp.array(tasks)], dict(adapters))
    return rows | {"head": _widened(rows["head"], max(num_outputs[task] for task in tasks))}


def append(first: Adapters, second: Adapters) -> dict[str, Any]:
    """The tasks of `first`, bit for bit, then those of `second`."""
    width = max(x["head"]["bias"].shape[-1] for x in (first, second))
    first, second = ({**x, "head": _widened(x["head"], width)} for x in (first, second))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def fresh(
    config: BertConfig, num_outputs: Sequence[int], method: Method, params: Any, key: Array
) -> dict[str, Any]:
    """The `adapters` of new tasks around an encoder.

    Args:
        config: the encoder's architecture.
        num_outputs: of each new task.
        method: what each of them adds.
        params: the `params` collection; copies of the encoder's parameters begin as these.
        key: random key.
    """
    model = MultiTaskModel(config, tuple(num_outputs), method)
    ids = jnp.zeros((1, 1), jnp.int32)

    @jax.jit
    def init(params: Any, key: Array) -> Any:
        _, variables = model.apply(
            {"params": params}, ids, ids, ids, 0, mutable=["adapters"], rngs={"params": key}
        )
        return variables["adapters"]

    return dict(init(params, key))


def _widened(head: Mapping[str, Array], width: int) -> dict[str, Array]:
    """kernel [T, D, C] and bias [T, C] with C = width; what lies beyond is zero."""

    def fit(x: Array) -> Array:
        x = x[..., :width]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])

    return {name: fit(x) for name, x in head.items()}
