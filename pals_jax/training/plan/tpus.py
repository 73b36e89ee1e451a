"""The TPUs that Google Cloud offers, and device descriptions to compile for without having one."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from pals_jax.runtime.errors import UserError

_GIB = 2**30


class Chip(NamedTuple):
    """Public figures of one chip (Google Cloud's pages "TPU v3" and so on; link: Jouppi et al.).

    The clocks are those of Norrie et al. 2021 (v2, v3), Jouppi et al. 2023 (v4) and, of v5e, the
    one at which its four units of 128 x 128 give its peak.

    Attributes:
        name: the compiler's name for the chip.
        devices: JAX devices per chip; before v4, one per core.
        flops: peak FLOP/s in bfloat16.
        hbm: bytes of memory.
        bandwidth: memory bandwidth in bytes/s.
        link: bytes/s of one link to a neighbouring chip, in one direction.
        clock: cycles/s of its cores; None if it is not public.
    """

    name: str
    devices: int
    flops: float
    hbm: float
    bandwidth: float
    link: float
    clock: float | None


_V2 = Chip("v2", 2, 46e12, 16 * _GIB, 700e9, 62e9, 700e6)
_V3 = Chip("v3", 2, 123e12, 32 * _GIB, 900e9, 82e9, 940e6)
_V4 = Chip("v4", 1, 275e12, 32 * _GIB, 1200e9, 50e9, 1050e6)
_V5E = Chip("v5e", 1, 197e12, 16 * _GIB, 819e9, 50e9, 1500e6)
_V6E = Chip("v6e", 1, 918e12, 32 * _GIB, 1638e9, 100e9, None)


class Kind(NamedTuple):
    """A kind of TPU that Google Cloud offers.

    Attributes:
        chip: the kind of chip.
        grid: the arrangement of all chips.
        host: the arrangement of one host's chips.
    """

    chip: Chip
    grid: tuple[int, int]
    host: tuple[int, int]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return self.grid[0] * self.grid[1]

    @property
    def devices(self) -> int:
        """The number of JAX devices of all chips."""
        return self.chips * self.chip.devices

    def compile_devices(self) -> list[jax.Device]:
        """Devices to compile for; nothing can run on them.

        Raises:
            UserError: if libtpu is not installed.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "the compiler for TPUs, libtpu, is not installed; get it (on Linux) with:"
                ' pip install "jax[tpu]".'
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options: dict[str, Any] = {"chips_per_host_bounds": [*self.host, 1]}
        if self.chip is _V4:
            options["chip_config_name"] = "megacore"  # both cores are one device
        topology = f"{self.chip.name}:{self.grid[0]}x{self.grid[1]}x1"
        return topologies.get_topology_desc(topology, "tpu", **options).devices


# Without these, libtpu queries Google Cloud's metadata server, and only one process may load it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# The kinds that launch/ supports, by Google Cloud's accelerator type.
KINDS = {
    "v2-8": Kind(_V2, (2, 2), (2, 2)),
    "v3-8": Kind(_V3, (2, 2), (2, 2)),
    "v4-8": Kind(_V4, (2, 2), (2, 2)),
    "v5litepod-4": Kind(_V5E, (2, 2), (2, 2)),
    "v5litepod-8": Kind(_V5E, (2, 4), (2, 4)),
    "v5litepod-16": Kind(_V5E, (4, 4), (2, 2)),
    "v6e-4": Kind(_V6E, (2, 2), (2, 2)),
    "v6e-8": Kind(_V6E, (2, 4), (2, 4)),
    "v3-32": Kind(_V3, (4, 4), (2, 2)),
}
