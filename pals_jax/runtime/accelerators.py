"""Which accelerators this machine has, asked without JAX, which would start them."""

import importlib.util
import os
from pathlib import Path


def has_tpu() -> bool:
    """Whether this is a Cloud TPU VM, with libtpu installed."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def skip_absent_tpu() -> None:
    """Keeps JAX from looking for a TPU that is not there, for seconds and with complaints.

    It would where libtpu is installed, which `plan` needs on machines without a TPU. Whoever has
    set JAX_PLATFORMS, a TPU or a plugin for another accelerator is left alone. To be called before
    JAX is imported.
    """
    installed = importlib.util.find_spec("libtpu") is not None
    others = importlib.util.find_spec("jax_plugins") is not None
    if installed and not has_tpu() and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
