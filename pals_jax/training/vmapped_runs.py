"""Runs that one step trains: `jax.vmap` over their adapters, heads and moments.

Runs on a frozen encoder that differ in seed and learning rate alone read one encoder and take the
same steps. Of runs with one seed, which see the same examples, what lies below the first adapter
and all dropout masks are computed once.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from pals_jax.data.sampler import Draw, Sampler
from pals_jax.experiment.config import encoder_is_frozen
from pals_jax.experiment.experiment import Experiment
from pals_jax.runtime.parallel import Step, on_this_host
from pals_jax.training.step import TrainState, make_train_step

Tree = Any


def can_be_trained_together(one: ConfigDict, other: ConfigDict) -> bool:
    """Whether one step can train both: a frozen encoder, and another seed or rate at most."""
    return encoder_is_frozen(one) and _rest(one) == _rest(other)


def _rest(config: ConfigDict) -> dict[str, Any]:
    """A configuration without what may differ: the seed and the learning rate."""
    rest: dict[str, Any] = config.to_dict()
    del rest["seed"], rest["optimizer"]["learning_rate"]
    return rest


def sharing(states: Iterable[TrainState]) -> list[TrainState]:
    """States, made one after the other, of which equal frozen leaves become one array in memory."""
    kept: list[TrainState] = []
    for state in states:
        if kept:
            frozen = jax.tree.map(_one_of_equal, kept[0].frozen, state.frozen)
            state = state.replace(frozen=frozen)  # noqa: PLW2901 - it lets go of what is equal
        kept.append(state)
    return kept


def _one_of_equal(first: Any, other: Any) -> Any:
    return first if np.array_equal(on_this_host(first), on_this_host(other)) else other


@dataclasses.dataclass(frozen=True)
class Together:
    """K runs with one state and one step. A single run is as it ever is, without an axis of runs.

    Attributes:
        experiments: of the runs.
        apart: for each leaf of the frozen part whether the runs have their own values; an encoder
            that came without a pooler was given one by the seed.
    """

    experiments: tuple[Experiment, ...]
    apart: Tree

    @classmethod
    def of(cls, experiments: Sequence[Experiment], states: Sequence[TrainState]) -> "Together":
        """Looks where the frozen parts of their first states, which are `sharing`, differ."""

        def differ(first: Any, *others: Any) -> bool:
            return not all(other is first for other in others)

        return cls(tuple(experiments), jax.tree.map(differ, *(state.frozen for state in states)))

    @property
    def _alone(self) -> bool:
        return len(self.experiments) == 1

    @property
    def _one_seed(self) -> bool:
        return len({experiment.config.seed for experiment in self.experiments}) == 1

    def stack(self, states: Sequence[TrainState]) -> TrainState:
        """The state of all, from those of each, which stand at the same step."""
        return states[0] if self._alone else self._map(lambda *x: jnp.stack(x), *states)

    def states(self, state: TrainState) -> Iterator[TrainState]:
        """The inverse: the state of each, made when it is asked for."""
        for run in range(len(self.experiments)):
            yield state if self._alone else self._map(lambda x, run=run: x[run], state)

    def scalars(self, scalars: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Those of each, [n], of n steps of all, [n, K]."""
        for run in range(len(self.experiments)):
            yield scalars if self._alone else {name: x[:, run] for name, x in scalars.items()}

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
        """What the step sees: one draw for all, or one for each."""
        return [sampler.draw(step) for sampler in (samplers[:1] if self._one_seed else samplers)]

    def train_step(self, axis_name: str | None) -> Step:
        """The pure training step, see `step.make_train_step`; of several, its scalars are [K]."""
        configs = [experiment.config for experiment in self.experiments]
        if self._alone:
            return self._step(configs[0].seed, configs[0].optimizer.learning_rate, axis_name)

        def step(state: TrainState, batch: Tree, seed: Array, learning_rate: Array) -> Any:
            return self._step(seed, learning_rate, axis_name)(state, batch)

        seeds = jnp.array([config.seed for config in configs], jnp.uint32)
        seeds = seeds[0] if self._one_seed else seeds
        rates = jnp.array([config.optimizer.learning_rate for config in configs])
        frozen = jax.tree.map(lambda apart: 0 if apart else None, self.apart)
        axes: Any = TrainState(None, 0, frozen, 0)  # type: ignore[arg-type]
        of_seeds = None if self._one_seed else 0
        together = jax.vmap(step, (axes, of_seeds, of_seeds, 0), (axes, 0))
        return lambda state, batch: together(state, batch, seeds, rates)

    def _step(self, seed: Any, learning_rate: Any, axis_name: str | None) -> Step:
        """The step of one of them, its seed and learning rate given or traced."""
        first = self.experiments[0]
        optimizer, _ = first.optimizer(learning_rate)
        return make_train_step(first.model(), optimizer, seed, axis_name)
