"""One shared encoder, many tasks, a few parameters each, in JAX and Flax."""

__version__ = "0.1.0"
