"""The devices of a run: one under `jax.jit`, several (on one or more hosts) under `jax.pmap`.

Data parallelism: each device has a part of the batch and, where weights are divided, of them and
of their moments. All else is replicated; it is passed without a device axis (`in_axes` and
`out_axes` None), so that nothing is stacked, gathered or copied between steps.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pals_jax.runtime.division import Division, Path, divisible
from pals_jax.runtime.shards import Shards

Tree = TypeVar("Tree")
Step = Callable[[Any, Any], Any]  # (state, batch) -> (state, scalars), or what a step gives
AXIS = "data"  # the name of the devices' axis


def available() -> list[jax.Device]:
    """The devices that a run uses, on all hosts."""
    return jax.devices()


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """The devices, in the order of the shards of a batch.

    Attributes:
        devices: the devices of all hosts.
        axes: the axes of divided leaves, see `division.Division`. In the state between two steps
            such an axis is two: one of this host's devices, and one of a device's part.
    """

    devices: tuple[jax.Device, ...]
    axes: Mapping[Path, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def over(cls, devices: Sequence[jax.Device] | None = None) -> "DataParallel":
        """Uses `devices`, or all there are, grouped by host in pmap's order."""
        devices = available() if devices is None else devices
        return cls(tuple(sorted(devices, key=lambda device: (device.process_index, device.id))))

    @property
    def axis_name(self) -> str | None:
        """The axis over which a step sums; None if there is one device."""
        return AXIS if len(self.devices) > 1 else None

    @property
    def division(self) -> Division:
        """What a step knows of the devices."""
        return Division(self.axis_name, self.axes)

    def dividing(self, weights: Any) -> "DataParallel":
        """The same devices, which divide `weights` among them: see `division.divisible`."""
        return dataclasses.replace(self, axes=divisible(weights, len(self.devices)))

    @property
    def shards(self) -> Shards:
        """The shards of every batch that this host makes."""
        here = [device.process_index == jax.process_index() for device in self.devices]
        return Shards(len(here), here.index(True), sum(here))

    def compile(self, step: Step, *, donate: bool = False, like: Any = None) -> Any:
        """Compiles `step(state, batch)`; only the batch has a leading axis of this host's shards.

        Args:
            step: a pure function that was made with this object's `axis_name` or `division`.
            donate: whether to reuse the state's memory for the result.
            like: a state, for a step that returns the next state and scalars, if its leaves are
                divided. None: state and result are replicated.

        Returns:
            The function that `jax.jit` or `jax.pmap` returns.
        """
        donated = (0,) if donate else ()
        if self.axis_name is None:
            alone = lambda state, batch: step(state, jax.tree.map(lambda x: x[0], batch))  # noqa: E731
            return jax.jit(alone, donate_argnums=donated)
        of_all: dict[str, Any] = {"devices": self.devices, "donate_argnums": donated}
        if like is None:
            return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, **of_all)
        # The leaves in a tuple, because with several processes jax.pmap hashes the results' axes.
        axes, structure = self.division.axes_of(like), jax.tree.structure(like)
        of_leaves = tuple(self.division.axis(path) for path, _ in jax.tree.leaves_with_path(like))

        def flat(state: Any, batch: Any) -> Any:
            state, scalars = step(state, batch)
            return tuple(jax.tree.leaves(state)), scalars

        mapped = jax.pmap(flat, AXIS, in_axes=(axes, 0), out_axes=(of_leaves, None), **of_all)

        def divided(state: Any, batch: Any) -> Any:
            leaves, scalars = mapped(state, batch)
            return jax.tree.unflatten(structure, leaves), scalars

        divided.lower = mapped.lower  # type: ignore[attr-defined]
        return divided

    @property
    def here(self) -> NamedSharding:
        """Replicated on all devices of this host: the sharding of the steps' state."""
        return _copies(self.devices[self.shards.mine(len(self.devices))])

    @property
    def one_per_host(self) -> NamedSharding:
        """Replicated on one device of each host: the sharding of checkpoints."""
        hosts = itertools.groupby(self.devices, key=lambda device: device.process_index)
        return _copies([next(devices) for _, devices in hosts])

    def put(self, tree: Tree) -> Tree:
        """Host arrays, or arrays restored from a checkpoint, as a step takes them."""
        axes = [self.division.axis(path) for path, _ in jax.tree.leaves_with_path(tree)]
        leaves = list(zip(jax.tree.leaves(tree), axes, strict=True))
        whole = jax.device_put([on_this_host(x) for x, axis in leaves if axis is None], self.here)
        others = iter(whole)
        put = [next(others) if axis is None else self._divide(x, axis) for x, axis in leaves]
        return jax.tree.unflatten(jax.tree.structure(tree), put)

    def put_shapes(self, tree: Tree) -> Tree:
        """The shapes that `put` gives arrays of the shapes `tree`."""

        def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
            shape, axis = list(x.shape), self.division.axis(path)
            if axis is not None:
                parts = self.shards.local, shape[axis] // len(self.devices)
                shape[axis : axis + 1] = parts
            return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

        return jax.tree_util.tree_map_with_path(one, tree)

    def _divide(self, x: Any, axis: int) -> jax.Array:
        """A divided array as a step takes it, [..., devices of this host, part, ...]."""
        here = self.devices[self.shards.mine(len(self.devices))]
        if isinstance(x, jax.Array) and not x.is_fully_replicated:  # it was restored in parts
            found = {shard.device: np.asarray(shard.data) for shard in x.addressable_shards}
            parts = [found[device] for device in here]
        else:
            every = np.split(np.asarray(on_this_host(x)), len(self.devices), axis)
            parts = every[self.shards.mine(len(every))]
        placed = [
            jax.device_put(np.expand_dims(part, axis), device)
            for part, device in zip(parts, here, strict=True)
        ]
        shape = list(placed[0].shape)
        shape[axis] = len(here)
        return jax.make_array_from_single_device_arrays(tuple(shape), _parts(here, axis), placed)

    def gathered(self, tree: Tree) -> Tree:
        """A part of the state with its divided leaves whole, replicated on all devices."""
        if not self.axes:
            return tree
        axes = self.division.axes_of(tree)
        gather = jax.pmap(self._gather, AXIS, in_axes=(axes,), out_axes=None, devices=self.devices)
        return gather(tree)

    @functools.cached_property
    def _gather(self) -> Callable[[Any], Any]:
        return self.division.gather  # one object, so that it is compiled once

    def put_batch(self, batch: Tree) -> Tree:
        """Moves a batch to the device if there is one; `jax.pmap` transfers the shards itself."""
        return batch if self.axis_name else jax.device_put(batch, self.devices[0])

    def checkpoint_sharding(self, path: Any) -> NamedSharding:
        """The sharding in checkpoints of the leaf at `path`; divided leaves are saved in parts."""
        axis = self.division.axis(path)
        return self.one_per_host if axis is None else _parts(self.devices, axis)

    def to_save(self, tree: Tree) -> Tree:
        """Views a step's result with the shardings of checkpoints; only parts are copied.

        NumPy arrays, which are the same on every host, stay as they are.
        """

        def one(path: Any, x: Any) -> Any:
            if isinstance(x, np.ndarray):
                return x
            sharding, axis = self.checkpoint_sharding(path), self.division.axis(path)
            shape, each = list(x.shape), [x.addressable_data(0)]
            if axis is not None:
                each = [jax.lax.squeeze(shard.data, (axis,)) for shard in x.addressable_shards]
                del shape[axis]
                shape[axis] *= len(self.devices)
            return jax.make_array_from_single_device_arrays(tuple(shape), sharding, each)

        return jax.tree_util.tree_map_with_path(one, tree)


def on_this_host(x: Any) -> Any:
    """This host's copy of an array; restored global arrays cannot be moved between devices."""
    return x.addressable_data(0) if isinstance(x, jax.Array) else x


def _copies(devices: Any) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())


def _parts(devices: Any, axis: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(*[None] * axis, AXIS))
