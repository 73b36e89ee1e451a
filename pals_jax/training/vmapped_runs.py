"""Trains several runs in one step: `jax.vmap` over their adapters, heads and moments.

This applies to runs on a frozen encoder that differ only in seed and learning rate; they share the
encoder. If they also share the seed, they see the same examples, and the layers below the first
adapter and all dropout masks are computed once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from pals_jax.data.batch import Batch
from pals_jax.data.sampler import Draw, Sampler
from pals_jax.experiment.config import encoder_is_frozen
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.workdir import refuse_another_experiment
from pals_jax.inference.evaluator import Evaluator, Results
from pals_jax.inference.hidden_cache import check_same
from pals_jax.runtime.compile_cache import keep_compiled
from pals_jax.runtime.division import Division
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel, Step, on_this_host
from pals_jax.training.run_writer import RunWriter
from pals_jax.training.step import TrainState, train_step_of
from pals_jax.training.train import describe, first_state, read_data, report, take_steps


def can_be_vmapped(one: ConfigDict, other: ConfigDict) -> bool:
    """Whether one step can train both: a frozen encoder, and only seed and rate may differ."""
    return encoder_is_frozen(one) and _rest(one) == _rest(other)


def _rest(config: ConfigDict) -> dict[str, Any]:
    """A configuration without the keys that may differ: the seed and the learning rate."""
    rest: dict[str, Any] = config.to_dict()
    del rest["seed"], rest["optimizer"]["learning_rate"]
    return rest


def share_frozen(states: Iterable[TrainState]) -> list[TrainState]:
    """Makes equal frozen leaves of the states share one array; consumes the states one by one."""
    kept: list[TrainState] = []
    for state in states:
        if kept:
            frozen = jax.tree.map(_one_of_equal, kept[0].frozen, state.frozen)
            state = state.replace(frozen=frozen)  # noqa: PLW2901 - frees the duplicate arrays
        kept.append(state)
    return kept


def _one_of_equal(first: Any, other: Any) -> Any:
    return first if np.array_equal(on_this_host(first), on_this_host(other)) else other


def train_together(configs: Sequence[ConfigDict], workdirs: Sequence[epath.Path]) -> list[Results]:
    """Trains K experiments in one step; each gets its own workdir, as if trained alone.

    Args:
        configs: configurations of which any two `can_be_vmapped`.
        workdirs: one workdir per configuration, all at the same step; see `train`.

    Returns:
        The dev results of each run's best checkpoint.

    Raises:
        Preempted, UserError: as for `train`.
    """
    experiments = [Experiment.from_config(config) for config in configs]
    for each, workdir in zip(experiments, workdirs, strict=True):
        refuse_another_experiment(each, workdir)
    experiment = experiments[0]  # represents all in everything but seed and learning rate
    keep_compiled(experiment.cache_dir)
    data = read_data(experiment)
    samplers = [each.sampler(data.sizes) for each in experiments]
    states = share_frozen(first_state(each) for each in experiments)
    data = data.with_hidden(experiment, states[0])

    parallel, runs = DataParallel.over(), VmappedRuns.of(experiments, states)
    batches = experiment.train_batches(data.train, samplers[0], parallel.shards)
    evaluator = Evaluator(experiment, parallel)
    describe(experiment, batches)

    with contextlib.ExitStack() as opened:
        writers = [
            opened.enter_context(RunWriter(each, workdir, data.tokenizer, sampler, parallel))
            for each, workdir, sampler in zip(experiments, workdirs, samplers, strict=True)
        ]
        given = states[0].variables
        states = share_frozen(w.restore(state) for w, state in zip(writers, states, strict=True))
        if _common_step(states):
            check_same(experiment, given, states[0].variables)
        for writer, state in zip(writers, states, strict=True):
            writer.keep_exact(state)
        state = parallel.put(runs.stack(states).in_compute_dtype(experiment.model().dtype))
        del given, states  # the state owns their memory from here on; the first step donates it

        def evaluate(done: int, state: TrainState) -> None:
            for writer, own in zip(writers, runs.states(state), strict=True):
                writer.evaluate(done, own, evaluator, data.evals)

        take_steps(
            experiment,
            parallel.compile(runs.train_step(parallel.division), donate=True),
            state,
            lambda step: parallel.put_batch(batches(*runs.draws(samplers, step))),
            _Writers(runs, writers),
            evaluate,
        )

    return [report(experiment, workdir, data) for workdir in workdirs]


def _common_step(states: Sequence[TrainState]) -> int:
    """The common step of all runs.

    Raises:
        UserError: if the runs are at different steps.
    """
    steps = {int(state.step) for state in states}
    if len(steps) > 1:
        raise UserError(
            f"the runs of the sweep are at different steps, {sorted(steps)}, because a checkpoint"
            " was damaged; run the same command again to train them separately."
        )
    return steps.pop()


@dataclasses.dataclass(frozen=True)
class _Writers:
    """Several runs' writers with the interface of one; each receives its own run's part.

    Attributes:
        runs: splits states and scalars into those of each run.
        writers: one writer per run.
    """

    runs: "VmappedRuns"
    writers: Sequence[RunWriter]

    def log(self, done: int, scalars: dict[str, np.ndarray], rate: float) -> None:
        for writer, own in zip(self.writers, self.runs.scalars(scalars), strict=True):
            writer.log(done, own, rate)

    def save(self, done: int, state: TrainState) -> None:
        for writer, own in zip(self.writers, self.runs.states(state), strict=True):
            writer.save(done, own)

    def wait(self) -> None:
        for writer in self.writers:
            writer.wait()

    @property
    def where(self) -> str:
        return ", ".join(writer.where for writer in self.writers)


@dataclasses.dataclass(frozen=True)
class VmappedRuns:
    """K runs with one state and one step; leaves have a leading axis of runs.

    Attributes:
        experiments: the experiments of the runs.
        apart: for each frozen leaf, whether it differs between runs; for example, a pooler missing
            from the checkpoint is initialised from each run's seed.
    """

    experiments: tuple[Experiment, ...]
    apart: optax.Params

    @classmethod
    def of(cls, experiments: Sequence[Experiment], states: Sequence[TrainState]) -> "VmappedRuns":
        """Finds the frozen leaves that differ between the first states (see `share_frozen`)."""

        def differ(first: Any, *others: Any) -> bool:
            return not all(other is first for other in others)

        return cls(tuple(experiments), jax.tree.map(differ, *(state.frozen for state in states)))

    @property
    def _one_seed(self) -> bool:
        return len({experiment.config.seed for experiment in self.experiments}) == 1

    def stack(self, states: Sequence[TrainState]) -> TrainState:
        """Combines the runs' states, which are at the same step, into one."""
        return self._map(lambda *x: jnp.stack(x), *states)

    def states(self, state: TrainState) -> Iterator[TrainState]:
        """The inverse of `stack`: yields each run's state lazily."""
        for run in range(len(self.experiments)):
            yield self._map(lambda x, run=run: x[run], state)

    def scalars(self, scalars: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Splits scalars of n steps, [n, K], into each run's, [n]."""
        for run in range(len(self.experiments)):
            yield {name: x[:, run] for name, x in scalars.items()}

    def _map(self, change: Callable[..., Array], *states: TrainState) -> TrainState:
        def frozen(apart: bool, *x: Array) -> Array:
            return change(*x) if apart else x[0]

        return TrainState(
            states[0].step,
            jax.tree.map(change, *(state.trainable for state in states)),
            jax.tree.map(frozen, self.apart, *(state.frozen for state in states)),
            jax.tree.map(change, *(state.opt_state for state in states)),
        )

    def draws(self, samplers: Sequence[Sampler], step: int) -> list[Draw]:
        """The draws of a step: one for all runs if they share the seed, otherwise one per run."""
        return [sampler.draw(step) for sampler in (samplers[:1] if self._one_seed else samplers)]

    def train_step(self, division: Division) -> Step:
        """The pure training step, see `step.make_train_step`; scalars have shape [K]."""
        configs = [experiment.config for experiment in self.experiments]

        def step(state: TrainState, batch: Batch, seed: Array, learning_rate: Array) -> Any:
            return self._step(seed, learning_rate, division)(state, batch)

        seeds = jnp.array([config.seed for config in configs], jnp.uint32)
        seeds = seeds[0] if self._one_seed else seeds
        rates = jnp.array([config.optimizer.learning_rate for config in configs])
        frozen = jax.tree.map(lambda apart: 0 if apart else None, self.apart)
        axes: Any = TrainState(None, 0, frozen, 0)  # type: ignore[arg-type]
        of_seeds = None if self._one_seed else 0
        together = jax.vmap(step, (axes, of_seeds, of_seeds, 0), (axes, 0))
        return lambda state, batch: together(state, batch, seeds, rates)

    def _step(self, seed: Any, learning_rate: Any, division: Division) -> Step:
        """The step of one run; seed and learning rate may be traced."""
        first = self.experiments[0]
        optimizer, _ = first.optimizer(learning_rate)
        return train_step_of(first, optimizer, division, seed)
