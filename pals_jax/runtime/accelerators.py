"""Detects this machine's accelerators without importing JAX, which would initialise them."""

import importlib.util
import os
from pathlib import Path


def has_tpu() -> bool:
    """Whether this is a Cloud TPU VM, with libtpu installed."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def skip_absent_tpu() -> None:
    """Stops JAX from searching for an absent TPU, which takes seconds and logs warnings.

    JAX searches if libtpu is installed, and `plan` needs libtpu on machines without a TPU. Does
    nothing if JAX_PLATFORMS is set, or a TPU or another accelerator's plugin is present. Must be
    called before JAX is imported.
    """
    installed = importlib.util.find_spec("libtpu") is not None
    others = importlib.util.find_spec("jax_plugins") is not None
    if installed and not has_tpu() and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
