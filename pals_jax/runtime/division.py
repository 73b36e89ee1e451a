"""The weights that are trained, their moments and their update, divided among the devices.

Every device keeps its part of each large array. A step gathers the weights, sums the gradients of
each part on its own device and updates it there: each device has 1/n of the optimiser's memory and
work, and exchanges no more than an all-reduce does. (Xu et al. 2020, "Automatic cross-replica
sharding of weight update in data-parallel training"; ZeRO.)
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

Tree = TypeVar("Tree")
Path = tuple[str, ...]  # the keys of a leaf in nested dictionaries


def divisible(weights: Any, devices: int) -> dict[Path, int]:
    """The kernels and tables that all tasks share, each with the axis to divide among `devices`.

    That is the axis of rows, if they can be divided. All else stays whole on every device: biases
    and layer norms are small, and to divide the 30,522 words of BERT by columns costs a TPU more
    for changes of layout than it saves.

    Args:
        weights: {"params", "adapters"}, or a part of it.
        devices: the number of devices.
    """
    axes: dict[Path, int] = {}
    for path, x in flatten_dict(weights).items():
        is_shared = path[0] == "params" and path[-1] in ("kernel", "embedding")
        if is_shared and devices > 1 and x.shape[-2] % devices == 0:
            axes[path] = x.ndim - 2
    return axes


@dataclasses.dataclass(frozen=True)
class Division:
    """Which leaves are divided among the devices, as a step sees it.

    Attributes:
        axis_name: the name of the devices' axis; None if there is one device.
        axes: for the path of each divided leaf its axis; the other leaves are whole everywhere.
    """

    axis_name: str | None = None
    axes: Mapping[Path, int] = dataclasses.field(default_factory=dict)

    def axis(self, path: Any) -> int | None:
        """The axis of a leaf of weights or, with the same keys at its end, of moments.

        Args:
            path: as `jax.tree_util.tree_map_with_path` gives it.
        """
        return self.axes.get(_keys(path))

    def axes_of(self, tree: Any) -> Any:
        """The tree of its leaves' axes, None for those that are whole."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self.axis(path), tree)

    def gather(self, tree: Tree) -> Tree:
        """The whole leaves of the devices' parts."""

        def one(path: Any, x: Any) -> Any:
            if (axis := self.axis(path)) is None:
                return x
            return jax.lax.all_gather(x, self.axis_name, axis=axis, tiled=True)

        return jax.tree_util.tree_map_with_path(one, tree)

    def sum(self, tree: Tree, dtype: Any = None, rows: Mapping[Path, Array] | None = None) -> Tree:
        """The sums of whole leaves over all devices; of divided leaves, this device's part.

        Args:
            tree: the leaves.
            dtype: in which they are exchanged and summed. None: in their own.
            rows: for the paths of some tables [V, D], numbers of rows, int [n], which may repeat:
                on this device all other rows are zero. Of such a table, unless it is divided, only
                these rows are exchanged.
        """
        if self.axis_name is None:
            return tree
        rows = rows or {}

        def cast(x: Array) -> Array:
            return x if dtype is None else x.astype(dtype)

        def one(path: Any, x: Any) -> Any:
            if (axis := self.axis(path)) is None:
                return self._sum_of_rows(x, rows[_keys(path)], cast)
            return jax.lax.psum_scatter(cast(x), self.axis_name, scatter_dimension=axis, tiled=True)

        def together(leaves: Any) -> Any:
            return jax.lax.psum(jax.tree.map(cast, leaves), self.axis_name)

        leaves = _leaves(tree)
        apart = [_keys(path) in rows or self.axis(path) is not None for path, _ in leaves]
        return _map(apart, one, together, tree)

    def _sum_of_rows(self, x: Array, rows: Array, cast: Any) -> Array:
        """The sum of tables [V, D], each of which is zero but for its device's `rows`, int [n]."""
        # A row that occurs twice counts once.
        is_first = (rows[:, None] == rows[None]).argmax(axis=1) == jnp.arange(len(rows))
        mine = cast(jnp.where(is_first[:, None], x[rows], jnp.zeros((), x.dtype)))
        gather = partial(jax.lax.all_gather, axis_name=self.axis_name, tiled=True)
        return jnp.zeros(x.shape, mine.dtype).at[gather(rows)].add(gather(mine))

    def totals(self, tree: Tree) -> Tree:
        """Sums over the devices of what each has computed of its part; other leaves are kept."""
        apart = [self.axis(path) is None for path, _ in _leaves(tree)]
        return _map(
            apart,
            lambda path, x: x,
            lambda of_parts: jax.lax.psum(of_parts, self.axis_name) if of_parts else [],
            tree,
        )


_DictKey = jax.tree_util.DictKey


def _keys(path: Any) -> Path:
    return tuple(key.key for key in path if isinstance(key, _DictKey))


def _map(apart: list[bool], one: Any, together: Any, tree: Any) -> Any:
    """`one(path, x)` of the leaves that are apart, and `together` of the list of the others."""
    leaves = list(zip(apart, _leaves(tree), strict=True))
    others = iter(together([x for alone, (_, x) in leaves if not alone]))
    mapped = [one(path, x) if alone else next(others) for alone, (path, x) in leaves]
    return jax.tree.unflatten(jax.tree.structure(tree), mapped)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return list(jax.tree_util.tree_flatten_with_path(tree)[0])
