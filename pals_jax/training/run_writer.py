"""Writes one run's workdir during training, whether it is trained alone or with others."""

import contextlib
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from pals_jax.data.sampler import Sampler
from pals_jax.experiment import workdir as workdir_lib
from pals_jax.experiment.checkpoint import Checkpoints
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.families import Tokenizer
from pals_jax.inference.evaluator import Evaluator, Splits
from pals_jax.models.adapters.bound import overlay
from pals_jax.models.compute_dtype import in_compute_dtype, only_cast
from pals_jax.runtime import distributed
from pals_jax.runtime.console import say
from pals_jax.runtime.parallel import DataParallel
from pals_jax.training.guards import check_finite
from pals_jax.training.metric_writer import MetricWriter
from pals_jax.training.step import TrainState


class RunWriter:
    """Context manager that writes the experiment, tokenizer, checkpoints and metrics of a run."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: epath.Path,
        tokenizer: Tokenizer,
        sampler: Sampler,
        parallel: DataParallel,
    ) -> None:
        """Writes the experiment and the tokenizer, and opens the checkpoints."""
        self._experiment, self._workdir, self._sampler = experiment, workdir, sampler
        self._parallel = parallel
        _, self._schedule = experiment.optimizer()
        workdir_lib.refuse_other_sizes(experiment, workdir, sampler.sizes)
        if distributed.is_main():
            workdir_lib.save(experiment, workdir, sampler.sizes)
            workdir_lib.save_tokenizer(tokenizer, workdir)
        distributed.barrier("workdir")
        workdir_lib.refuse_vanished(workdir)
        self._opened = contextlib.ExitStack()
        self._checkpoints = self._opened.enter_context(Checkpoints(workdir, parallel))

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint, or `state`, on the devices; drops metric lines of later steps."""
        state = self._checkpoints.restore(state)
        self._writer = self._opened.enter_context(MetricWriter(self._workdir, int(state.step)))
        return state

    def keep_exact(self, state: TrainState) -> None:
        """Keeps on this host the frozen weights that devices will hold only in the compute dtype.

        Checkpoints get these, in float32.
        """
        exact = only_cast(state.frozen, self._experiment.model().dtype)
        self._exact = jax.tree.map(np.asarray, exact)

    def log(self, done: int, scalars: dict[str, np.ndarray], rate: float) -> None:
        """Writes the means of the scalars over the last n of `done` steps.

        Args:
            done: the number of steps taken.
            scalars: [n] each; see `step.make_train_step`.
            rate: examples per second.

        Raises:
            Diverged: if the training has diverged.
        """
        first = done - len(scalars["loss"])
        check_finite(first, scalars, self._sampler.draw, self._experiment.trained)
        means = {name: float(np.mean(values)) for name, values in scalars.items()}
        rates = {"examples_per_second": rate, "learning_rate": float(self._schedule(done - 1))}
        self._writer.write(done, means | rates)

    def save(self, done: int, state: TrainState) -> None:
        """Writes a checkpoint.

        Raises:
            UserError: if the workdir no longer exists or cannot be written.
        """
        workdir_lib.refuse_vanished(self._workdir)
        self._writer.flush()  # first, because a run resumed from here will not write these lines
        exact = overlay(state.frozen, self._exact)
        self._checkpoints.save(done, state.replace(frozen=exact))

    def evaluate(self, done: int, state: TrainState, evaluator: Evaluator, splits: Splits) -> None:
        """Evaluates at the end of an epoch, and keeps the best checkpoint."""
        workdir_lib.refuse_vanished(self._workdir)
        variables, dtype = state.variables, self._experiment.model().dtype
        gathered = self._parallel.gathered(in_compute_dtype(variables, dtype))
        predictions = evaluator.predict(gathered, splits)
        results = evaluator.measure(predictions, splits)
        score = evaluator.score(results)
        self._writer.write(done, flatten_dict(results, sep="/") | {"score": score})
        config = self._experiment.config
        epoch = done // config.steps_per_epoch
        say(f"{self._workdir.name}: epoch {epoch} of {config.epochs}: {score:.4f}")
        best = overlay(variables, self._exact)
        self._checkpoints.save_best(done, best, score, results, predictions)

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        self._checkpoints.wait()

    @property
    def where(self) -> str:
        """The name of the workdir."""
        return str(self._workdir)

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)
