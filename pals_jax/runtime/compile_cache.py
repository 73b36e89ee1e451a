"""Caching of compiled programs, on disk and in memory."""

from pathlib import Path

import jax


def keep_compiled(cache_dir: Path) -> None:
    """Caches compiled programs in `cache_dir`, unless JAX already has a cache directory."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
        # No minimum: the many small programs take two of the twelve seconds of a start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def forget_compiled() -> None:
    """Frees this process's compiled programs; for use between runs.

    On CPUs a run's programs use a thousand or more of the 65,530 memory maps that Linux allows a
    process, and the compiler crashes when they run out.
    """
    jax.clear_caches()
