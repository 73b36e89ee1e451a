"""The host-side task sampler: which task and which examples a step sees.

Everything is a pure function of the seed and the step number, so that a checkpoint needs no
iterator state and every host of a pod computes the same plan without communication.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pals_jax.runtime.errors import UserError

SAMPLING_SCHEDULES = ("round_robin", "proportional", "sqrt", "annealed")

# The purpose of a random stream, which is part of its key.
_TASKS, _EXAMPLES = 0, 1


def task_probabilities(sizes: Sequence[int], schedule: str, epoch: int, epochs: int) -> np.ndarray:
    """The probability of each task: p_i proportional to N_i ** alpha.

    alpha is 1 for "proportional", 0.5 for "sqrt", 1 - 0.8 (e - 1) / (E - 1) in epoch e of E for
    "annealed" (Stickland & Murray, section 4.1), and 0 for "round_robin", whose cycle is fixed.

    Args:
        sizes: N_i, the number of training examples of each of the T tasks.
        schedule: one of `SAMPLING_SCHEDULES`.
        epoch: e, from 1.
        epochs: E.

    Returns:
        float64 [T], summing to 1.

    Raises:
        UserError: an unknown schedule, or a task without examples.
        ValueError: an epoch outside 1 to E.
    """
    if schedule not in SAMPLING_SCHEDULES:
        raise UserError(
            f"unknown sampling {schedule!r}; known are {', '.join(SAMPLING_SCHEDULES)}."
        )
    if min(sizes) < 1:
        raise UserError(f"task {list(sizes).index(min(sizes))} has no training examples.")
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch {epoch} is not in 1 to {epochs}")
    annealed = 1.0 - 0.8 * (epoch - 1) / max(epochs - 1, 1)
    alpha = {"round_robin": 0.0, "proportional": 1.0, "sqrt": 0.5, "annealed": annealed}[schedule]
    weights = np.asarray(sizes, np.float64) ** alpha
    return weights / weights.sum()


class Draw(NamedTuple):
    """The tasks and examples of one step.

    Attributes:
        trained_ids: int32 [G]; the task of each group, as an index among the trained tasks.
        examples: int64 [G, b]; indices into that task's training examples.
    """

    trained_ids: np.ndarray
    examples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The plan of a run.

    Each task passes through all of its data, reshuffled for each pass, before an example repeats.

    Attributes:
        sizes: the number of training examples of each of the T tasks.
        schedule: one of `SAMPLING_SCHEDULES`.
        seed: the seed of tasks and examples.
        epochs: the number of epochs; the annealed schedule changes once per epoch.
        steps_per_epoch: the number of steps in each epoch.
        groups: G, the task groups in a batch; 1 gives the papers' single-task step.
        group_size: b, the examples in each group.
    """

    sizes: tuple[int, ...]
    schedule: str
    seed: int
    epochs: int
    steps_per_epoch: int
    groups: int
    group_size: int

    def __post_init__(self) -> None:
        task_probabilities(self.sizes, self.schedule, 1, self.epochs)  # reports errors early

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def spread(self, count: int = 256) -> list[int]:
        """Steps spread evenly over the run, as a sample of it."""
        return np.unique(np.linspace(0, self.steps - 1, count, dtype=int)).tolist()

    def draw(self, step: int) -> Draw:
        """Tasks and examples of a step; any step can be drawn without the ones before it.

        Raises:
            ValueError: a step outside the run.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not in 0 to {self.steps - 1}")
        draws = slice(step * self.groups, (step + 1) * self.groups)
        trained_ids = self._tasks[draws]
        pairs = zip(trained_ids.tolist(), self._earlier_draws[draws].tolist(), strict=True)
        examples = [self._examples(task, earlier) for task, earlier in pairs]
        return Draw(trained_ids, np.stack(examples))

    @functools.cached_property
    def _tasks(self) -> np.ndarray:
        """int32 [draws]: the task of every draw of the run."""
        per_epoch = self.steps_per_epoch * self.groups
        if self.schedule == "round_robin":
            return (np.arange(self.epochs * per_epoch) % len(self.sizes)).astype(np.int32)
        uniform = _generator(self.seed, _TASKS).random((self.epochs, per_epoch))
        tasks = np.empty(uniform.shape, np.int32)
        for epoch in range(self.epochs):
            p = task_probabilities(self.sizes, self.schedule, epoch + 1, self.epochs)
            # The last bound is 1 up to rounding; dropping it keeps every draw within range.
            tasks[epoch] = np.searchsorted(np.cumsum(p)[:-1], uniform[epoch], side="right")
        return tasks.reshape(-1)

    @functools.cached_property
    def _earlier_draws(self) -> np.ndarray:
        """int64 [draws]: how often the task of each draw was drawn before."""
        earlier = np.empty(len(self._tasks), np.int64)
        for task in range(len(self.sizes)):
            mine = self._tasks == task
            earlier[mine] = np.arange(mine.sum())
        return earlier

    def _examples(self, task: int, earlier: int) -> np.ndarray:
        """int64 [b]: the examples of the task's draw number `earlier`."""
        positions = earlier * self.group_size + np.arange(self.group_size)
        passes, places = np.divmod(positions, self.sizes[task])
        orders = {p: _order(self.seed, task, p, self.sizes[task]) for p in set(passes.tolist())}
        return np.array([orders[p][i] for p, i in zip(passes.tolist(), places, strict=True)])


@functools.lru_cache(maxsize=64)
def _order(seed: int, task: int, pass_: int, size: int) -> np.ndarray:
    """The order of a task's examples in one pass through them."""
    return _generator(seed, _EXAMPLES, task, pass_).permutation(size)


def _generator(*key: int) -> np.random.Generator:
    """A separate counter-based generator for each key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
