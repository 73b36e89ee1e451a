"""The devices of a run: one under `jax.jit`, several (on one or more hosts) under `jax.pmap`.

Data parallelism: everything except the batch is replicated. Parameters and state are passed
without a device axis (`in_axes` and `out_axes` None), so that nothing is stacked, gathered or
copied between steps.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    """

    devices: tuple[jax.Device, ...]

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
    def shards(self) -> Shards:
        """The shards of every batch that this host makes."""
        here = [device.process_index == jax.process_index() for device in self.devices]
        return Shards(len(here), here.index(True), sum(here))

    def compile(self, step: Step, *, donate: bool = False) -> Any:
        """Compiles `step(state, batch)`; only the batch has a leading axis of this host's shards.

        Args:
            step: a pure function that was made with this object's `axis_name`.
            donate: whether to reuse the state's memory for the result.

        Returns:
            The function that `jax.jit` or `jax.pmap` returns.
        """
        donated = (0,) if donate else ()
        if self.axis_name is None:
            alone = lambda state, batch: step(state, jax.tree.map(lambda x: x[0], batch))  # noqa: E731
            return jax.jit(alone, donate_argnums=donated)
        return jax.pmap(
            step,
            self.axis_name,
            in_axes=(None, 0),
            out_axes=None,
            devices=self.devices,
            donate_argnums=donated,
        )

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
        """Replicates host arrays, or arrays restored from a checkpoint, on this host's devices."""
        return jax.device_put(jax.tree.map(on_this_host, tree), self.here)

    def put_batch(self, batch: Tree) -> Tree:
        """Moves a batch to the device if there is one; `jax.pmap` transfers the shards itself."""
        return batch if self.axis_name else jax.device_put(batch, self.devices[0])

    def to_save(self, tree: Tree) -> Tree:
        """Views a step's result with the sharding `one_per_host`, without copying.

        NumPy arrays, which are the same on every host, stay as they are.
        """
        sharding = self.one_per_host

        def one(x: Any) -> Any:
            if isinstance(x, np.ndarray):
                return x
            return jax.make_array_from_single_device_arrays(
                x.shape, sharding, [x.addressable_data(0)]
            )

        return jax.tree.map(one, tree)


def on_this_host(x: Any) -> Any:
    """This host's copy of an array; restored global arrays cannot be moved between devices."""
    return x.addressable_data(0) if isinstance(x, jax.Array) else x


def _copies(devices: Any) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
