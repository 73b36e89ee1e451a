"""The public name of the defaults: a configuration begins `from pals_jax.config import default`."""

from pals_jax.experiment.config import default

__all__ = ["default"]
