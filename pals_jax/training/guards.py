"""Checks during training: divergence, and repeated compilation."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pals_jax.data.batch import Batch
from pals_jax.data.sampler import Draw
from pals_jax.data.tasks import Task
from pals_jax.runtime.errors import Diverged

_LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # JAX's event, once per executable
_DIVERGED = 1e4  # far above any cross-entropy or squared error of a healthy run


class CompilationWarning(UserWarning):
    """A step was compiled again for a batch of a known shape."""


class CompilationGuard:
    """Counts a step's compilations, and warns if a batch shape is compiled more than once.

    Attributes:
        count: the number of executables compiled so far.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        """Guards `step(state, batch)`, which is jitted or pmapped."""
        self._step = step
        self._seen: set[Any] = set()
        self._thread: int | None = None  # the thread that is executing the step
        self.count = 0

    def __enter__(self) -> "CompilationGuard":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == _LOWERING and threading.get_ident() == self._thread

    def __call__(self, state: Any, batch: Batch) -> Any:
        """The step's own result."""
        shapes = tuple(
            (jax.tree_util.keystr(path), x.shape, x.dtype)
            for path, x in jax.tree.leaves_with_path(batch)
        )
        before, self._thread = self.count, threading.get_ident()
        try:
            result = self._step(state, batch)
        finally:
            self._thread = None
        if self.count > before and shapes in self._seen:
            warnings.warn(
                f"the training step was compiled again for a batch of a known shape,"
                f" {batch.input_ids.shape}, so it now has {self.count} compilations. The results"
                " are correct, but the run is slower than it should be.",
                CompilationWarning,
                stacklevel=2,
            )
        self._seen.add(shapes)
        return result


def check_finite(
    first_step: int,
    scalars: dict[str, np.ndarray],
    draw: Callable[[int], Draw],
    tasks: Sequence[Task],
) -> None:
    """Stops a run that has diverged, naming the step, its tasks and its examples.

    Args:
        first_step: the number of the first step, from 0.
        scalars: loss and grad_norm of n consecutive steps, [n] each.
        draw: the sampler's `draw`.
        tasks: the tasks of the sampler.

    Raises:
        Diverged: if a loss or gradient norm is not finite, or a loss exceeds 1e4.
    """
    bad = ~np.isfinite(scalars["loss"]) | ~np.isfinite(scalars["grad_norm"])
    bad |= scalars["loss"] > _DIVERGED
    if not bad.any():
        return
    at = int(bad.argmax())
    seen = draw(first_step + at)
    what = "; ".join(
        f"{tasks[task].name}: {', '.join(map(str, examples))}"
        for task, examples in zip(seen.trained_ids.tolist(), seen.examples.tolist(), strict=True)
    )
    raise Diverged(
        f"the training has diverged: in step {first_step + at + 1} the loss is"
        f" {scalars['loss'][at]:.4g} and the gradient's norm {scalars['grad_norm'][at]:.4g};"
        " lower optimizer.learning_rate, or check the step's examples (as rows of the train data"
        f" from 0: {what}); earlier checkpoints are unaffected."
    )
