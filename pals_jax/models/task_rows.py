"""The task axis of a batch: each row is computed with the parameters of its own task.

One row is an ordinary forward pass with its task's parameters. `jax.vmap` extends it to the rows
of one task, and again to the G equal groups of rows in a batch, one task each. Parameters that rows
or tasks share are not copied.

Dimension letters: see `pals_jax.models.layers`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters import bound
from pals_jax.models.adapters import spec as spec_lib
from pals_jax.models.adapters.forms import Params
from pals_jax.models.adapters.places import Place, check, places
from pals_jax.models.adapters.spec import Method, TaskCopy
from pals_jax.models.dropout import example_salts
from pals_jax.models.segments import Packing
from pals_jax.models.transformer import StackConfig
from pals_jax.runtime.errors import UserError


class Own(NamedTuple):
    """What one row is computed with: random keys, and the row's `first` [1, M] and salts."""

    rngs: dict[str, Array]
    first: Array
    salts: Array | None


def declare(
    module: nn.Module,
    method: Method,
    stacks: Mapping[str, StackConfig],
    params: Mapping[str, Params],
    num_tasks: int,
) -> dict[str, Any]:
    """The variables of a method's places in the `adapters` collection, by name.

    Args:
        module: the model whose variables they are.
        method: the method.
        stacks: the architecture of each stack of layers: "encoder", "decoder".
        params: their parameters.
        num_tasks: T.

    Raises:
        UserError: parts of the method collide, or have no place.
    """
    check(method, stacks, params)

    def init(place: Place, config: StackConfig) -> Params:
        if isinstance(place.part, TaskCopy):
            return place.part.copies(params[place.block], config.num_hidden_layers, num_tasks)
        key = module.make_rng("params")
        return spec_lib.init(key, place.part.parameters(config), num_tasks)

    return {
        place.name: module.variable("adapters", place.name, init, place, config)
        for block, config in stacks.items()
        for place in places(method, block)
        if place.has_parameters(config)
    }


def by_row(
    run: Callable[..., Any],
    collection: Mapping[str, Params],
    task_ids: Array,
    num_tasks: int,
    packing: Packing | None,
    dropout_key: Array | None,
    *inputs: Any,
) -> Any:
    """Maps `run(adapter_params, task, own, *inputs)` over the rows, each a batch of one.

    Args:
        run: see above; its results have a leading axis of one row.
        collection: the `adapters` collection, leaves [T, ...].
        task_ids: int, a scalar or [G]: the task of each of G equal groups of rows.
        num_tasks: T.
        packing: where the examples of each row are. None: each row is one.
        dropout_key: the key of the dropout masks. None: dropout is off.
        *inputs: trees of arrays [B, ...].

    Returns:
        The results, each [B, ...].
    """
    rows = jax.tree.leaves(inputs)[0].shape[0]
    packing = Packing.alone(rows) if packing is None else packing
    groups = _task_groups(task_ids, rows, num_tasks)
    adapter_params = {name: bound.select(tree, groups) for name, tree in collection.items()}
    rngs, salts = {}, None
    if dropout_key is not None:
        rngs["dropout"] = dropout_key
        salts = example_salts(dropout_key, packing.example_ids)

    def one(adapter_params: Any, task: Array, row: Any) -> Any:
        first, salts, *inputs = jax.tree.map(lambda x: x[None], row)
        out = run(adapter_params, task, Own(rngs, first, salts), *inputs)
        return jax.tree.map(lambda x: x[0], out)

    grouped = jax.tree.map(
        lambda x: x.reshape(groups.shape[0], -1, *x.shape[1:]), (packing.first, salts, *inputs)
    )
    out = jax.vmap(jax.vmap(one, (None, None, 0)))(adapter_params, groups, grouped)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _task_groups(task_ids: Array, rows: int, num_tasks: int) -> Array:
    """`task_ids` as int [G]; outside a trace, ids out of range are refused."""
    groups = jnp.atleast_1d(task_ids)
    if groups.ndim != 1 or rows % groups.shape[0]:
        raise ValueError(f"task_ids of shape {groups.shape} cannot be dealt to {rows} rows.")
    if not isinstance(groups, jax.core.Tracer):
        check_task_ids(num_tasks, *map(int, groups))
    return groups


def check_task_ids(count: int, *tasks: int) -> None:
    """Refuses task ids that are not among the `count` tasks of a model.

    Raises:
        UserError: there is no such task.
    """
    if wrong := [task for task in tasks if not 0 <= task < count]:
        raise UserError(
            f"task id {wrong[0]} is out of range; the {count} tasks are 0 to {count - 1}."
        )
