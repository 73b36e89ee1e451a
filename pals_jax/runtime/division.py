"""The weights that are trained, their moments and their update, divided among the devices.

Every device keeps its part of each large array. A step gathers the weights, sums the gradients of
each part on its own device and updates it there: each device has 1/n of the optimiser's memory and
work, and exchanges no more than an all-reduce does. (Xu et al. 2020, "Automatic cross-replica
sharding of weight update in data-parallel training"; ZeRO.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax.traverse_util import flatten_dict

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
        return self.axes.get(tuple(key.key for key in path if isinstance(key, _DictKey)))

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

    def sum(self, tree: Tree, dtype: Any = None) -> Tree:
        """The sums of whole leaves over all devices; of divided leaves, this device's part.

        Args:
            tree: the leaves.
            dtype: in which they are exchanged and summed. None: in their own.
        """
        if self.axis_name is None:
            return tree
        if dtype is not None:
            tree = jax.tree.map(lambda x: x.astype(dtype), tree)

        def part(path: Any, x: Any) -> Any:
            axis = self.axis(path)
            return jax.lax.psum_scatter(x, self.axis_name, scatter_dimension=axis, tiled=True)

        return self._map(part, lambda leaves: jax.lax.psum(leaves, self.axis_name), tree)

    def totals(self, tree: Tree) -> Tree:
        """Sums over the devices of what each has computed of its part; other leaves are kept."""
        of_parts = [x for path, x in _leaves(tree) if self.axis(path) is not None]
        totals = iter(jax.lax.psum(of_parts, self.axis_name) if of_parts else ())
        return self._map(lambda path, _: next(totals), lambda leaves: leaves, tree)

    def _map(self, part: Any, whole: Any, tree: Any) -> Any:
        """`part(path, x)` of divided leaves, and `whole` of the list of the others."""
        leaves = _leaves(tree)
        others = iter(whole([x for path, x in leaves if self.axis(path) is None]))
        mapped = [next(others) if self.axis(p) is None else part(p, x) for p, x in leaves]
        return jax.tree.unflatten(jax.tree.structure(tree), mapped)


_DictKey = jax.tree_util.DictKey


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return list(jax.tree_util.tree_flatten_with_path(tree)[0])
