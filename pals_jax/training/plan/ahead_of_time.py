"""Ahead-of-time compilation of a step, for devices that this machine need not have."""

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
    """A compiled step.

    Attributes:
        program: the work of one device.
        arguments: bytes per device of the state, the batch and non-donated results.
        temporaries: peak bytes per device of everything else.
        seconds: the time of tracing and compiling on this machine.
    """

    program: hlo.Program
    arguments: int
    temporaries: int
    seconds: float


def compile_step(step: Any, state: Any, batch: Any) -> Compiled:
    """Compiles a step from `DataParallel.compile`; only the shapes of its arguments matter.

    Raises:
        UserError: if the step needs more memory than a device has.
    """
    start = time.perf_counter()
    try:
        with no_compilation_cache():
            compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\b[\d.]+[KMGT]\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        raise UserError(
            f"a step needs {sizes[0]} of the {sizes[1]} bytes of memory that a device has; lower"
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
def no_compilation_cache() -> Iterator[None]:
    """Disables JAX's on-disk cache, because reading it would require the devices."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # because JAX checks only once whether the cache is enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()
