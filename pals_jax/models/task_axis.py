"""The task axis: choosing, ordering and adding tasks are indexing and concatenation.

The functions take any tree whose leaves lead with a task axis: the `adapters` collection, or an
optimiser's state for it (see `experiment.optim.map_tasks`). Only the width of the head and of its
moments depends on the other tasks: heads are padded with zeros to the largest number of outputs.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.models.adapters.spec import Method
from pals_jax.models.architectures import Architecture, new_model
from pals_jax.models.task_rows import check_task_ids

Tree = TypeVar("Tree")


def take(tree: Tree, num_outputs: Sequence[int], tasks: Sequence[int]) -> Tree:
    """The rows of `tasks`, in that order, with heads as wide as these need; bit for bit.

    Args:
        tree: leaves [T, ...].
        num_outputs: of each of the T tasks.
        tasks: indices; some may be left out, and the order may be another.

    Raises:
        UserError: there is no such task.
    """
    check_task_ids(len(num_outputs), *tasks)
    width = max(num_outputs[task] for task in tasks)

    def rows(path: Any, x: Array) -> Array:
        x = x[jnp.array(tasks)]
        return _widened(x, width) if _is_head(path) else x

    return jax.tree_util.tree_map_with_path(rows, tree)


def append(first: Tree, second: Tree) -> Tree:
    """The tasks of `first`, bit for bit, then those of `second`; leaves [T, ...] of both."""

    def rows(path: Any, a: Array, b: Array) -> Array:
        if _is_head(path):
            width = max(a.shape[-1], b.shape[-1])
            a, b = _widened(a, width), _widened(b, width)
        return jnp.concatenate([a, b])

    return jax.tree_util.tree_map_with_path(rows, first, second)


def with_room(tree: Tree, tasks: int, width: int) -> Tree:
    """The same tasks with room for others: zeros behind their rows and their heads' outputs.

    Args:
        tree: leaves [T, ...], NumPy arrays.
        tasks: the length of the task axis; at least T.
        width: the width of the heads; at least the tree's.

    Returns:
        Leaves [tasks, ...], NumPy arrays: nothing is compiled.
    """

    def rows(path: Any, x: np.ndarray) -> np.ndarray:
        room = [(0, tasks - len(x))] + [(0, 0)] * (x.ndim - 1)
        if _is_head(path):
            room[-1] = (0, width - x.shape[-1])
        return np.pad(x, room)

    return jax.tree_util.tree_map_with_path(rows, tree)


def gather(tree: Tree, tasks: Array | None) -> Tree:
    """The rows [U, ...] of `tasks`, int [U] and different from each other, or all of them."""
    if tasks is None:
        return tree
    return jax.tree.map(lambda x: x.at[tasks].get(mode="promise_in_bounds"), tree)


def scatter(tree: Tree, tasks: Array | None, rows: Tree) -> Tree:
    """The leaves [T, ...] of `tree` with `rows` [U, ...] as those of `tasks`; see `gather`.

    If `tree` is donated, the rows are written in place, at the cost of U tasks instead of T. XLA
    does so only if it can see that every read comes before the first write; one loop that writes
    all leaves shows that. XLA unrolls a loop of a single iteration, so the loop has at least two,
    and writes a single task twice.
    """
    if tasks is None:
        return rows
    count = len(tasks)

    def write(turn: Array, tree: Tree) -> Tree:
        u = jnp.minimum(turn, count - 1)
        return jax.tree.map(
            lambda x, row: jax.lax.dynamic_update_index_in_dim(x, row[u], tasks[u], axis=0),
            tree,
            rows,
        )

    return jax.lax.fori_loop(0, max(count, 2), write, tree)


def spread(rows: Tree, tasks: Array | None, count: int) -> Tree:
    """Leaves [T, ...] of `count` tasks: `rows` [U, ...] as those of `tasks`, zeros elsewhere.

    A selection and a sum over the slots, which XLA can fuse with what reads it; for few slots.
    """
    if tasks is None:
        return rows
    is_row = tasks[None] == jnp.arange(count)[:, None]

    def one(x: Array) -> Array:
        here = is_row.reshape(*is_row.shape, *[1] * (x.ndim - 1))
        return jnp.where(here, x[None], jnp.zeros((), x.dtype)).sum(axis=1)

    return jax.tree.map(one, rows)


def fresh(
    config: Architecture,
    num_outputs: Sequence[int],
    method: Method,
    params: Any,
    key: Array,
) -> dict[str, Any]:
    """The `adapters` of new tasks around an encoder or an encoder-decoder.

    Args:
        config: its architecture.
        num_outputs: of each new task; of an encoder-decoder, which has no heads, any number.
        method: what each of them adds.
        params: the `params` collection; copies of its parameters begin as these.
        key: random key.
    """
    model = new_model(config, num_outputs, method)

    @jax.jit
    def init(params: Any, key: Array) -> Any:
        _, variables = model.apply(
            {"params": params}, mutable=["adapters"], rngs={"params": key}, method="declare"
        )
        return variables.get("adapters", {})

    return dict(init(params, key))


def _is_head(path: Any) -> bool:
    return any(getattr(key, "key", None) == "head" for key in path)


def _widened(x: Array, width: int) -> Array:
    """A head's kernel [T, D, C] or bias [T, C], with C = width; what lies beyond is zero."""
    x = x[..., :width]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
