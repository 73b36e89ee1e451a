"""Compiled steps: kept on disk for the next time, and those for devices that need not be here."""

from pathlib import Path

import jax


def keep_compiled(cache_dir: Path) -> None:
    """Keeps what this process compiles on disk, where JAX was not told of another place."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
        # The many small programs of a start take two of its twelve seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def forget_compiled() -> None:
    """Lets go of what this process has compiled, after a run that is not its last.

    On CPUs a run's programs take a thousand or more of the 65,530 memory maps that Linux gives a
    process, and when they are used up the compiler crashes.
    """
    jax.clear_caches()
