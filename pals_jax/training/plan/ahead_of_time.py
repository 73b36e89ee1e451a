"""Compiling a step ahead of time, for devices that need not be here."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from pals_jax.runtime.errors import UserError
from pals_jax.training.plan import hlo


class Compiled(NamedTuple):
    """What the compiler made of a step.

    Attributes:
        program: what one device does.
        arguments: bytes per device of state and batch, and of what comes out beside the state.
        temporaries: bytes per device, at most, of everything else.
        seconds: the time that tracing and compiling took here.
    """

    program: hlo.Program
    arguments: int
    temporaries: int
    seconds: float


def compile_step(step: Any, state: Any, batch: Any) -> Compiled:
    """Compiles a step that `DataParallel.compile` made, for arguments of which only shapes matter.

    Raises:
        UserError: it takes more memory than a device has.
    """
    start = time.perf_counter()
    try:
        with _no_compilation_cache():
            compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\b[\d.]+[KMGT]\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        raise UserError(
            f"a step takes {sizes[0]} of the {sizes[1]} bytes of memory that a device has; lower"
            " batch_size, eval_batch_size or data.max_length, or set remat."
        ) from error
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        hlo.read(compiled.as_text()),
        memory.argument_size_in_bytes + results,
        memory.temp_size_in_bytes,
        seconds,
    )


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """JAX's cache on disk could be written here but not read: that takes the devices."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # for JAX asks only once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()
