"""The public import path of the defaults: `from pals_jax.config import default`."""

from pals_jax.experiment.config import default

__all__ = ["default"]
