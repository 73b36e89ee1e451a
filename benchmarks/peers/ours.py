"""A worker: pals_jax, doing all that `pals-jax train` and `evaluate` do in their loops."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from worker import Peak, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from glue_mix import Mix, taken

from pals_jax.data.batch import Batch
from pals_jax.experiment.optim import make_optimizer
from pals_jax.inference.evaluator import Evaluator
from pals_jax.inference.steps import apply_to_batch
from pals_jax.runtime.compile_cache import forget_compiled
from pals_jax.runtime.parallel import DataParallel
from pals_jax.training.losses import example_losses
from pals_jax.training.step import create_state, train_step_of


def main() -> None:
    """Compiles the steps for every batch shape, then takes the requested steps."""
    given = json.loads((Path(sys.argv[1]) / "ours.json").read_text())
    steps = Steps(Mix(**given["mix"]), given["each"])
    losses = [steps.loss(i) for i in range(given["check"])]
    forget_compiled()  # the check's many small programs would count in the steps' memory
    shapes = steps.compile(given["kind"], given["steps"])

    def do(begin: int, end: int) -> None:
        getattr(steps, given["kind"])(range(begin, end))

    device = jax.devices()[0]
    peak = None
    if device.platform != "cpu":  # this counter covers the whole process and cannot be reset
        peak = Peak(lambda: None, lambda: device.memory_stats()["peak_bytes_in_use"])
    serve({"losses": losses, "shapes": shapes}, do, peak)


class Steps:
    """The compiled steps of the mix and their state."""

    def __init__(self, mix: Mix, each: int) -> None:
        """Loads the weights; see `Mix.inference` for `each`."""
        experiment, self._parallel = mix.experiment, DataParallel.over()
        config, self._model = experiment.config, experiment.model()
        optimizer, _ = make_optimizer(config.optimizer, len(experiment.tasks), 60_000)
        step = train_step_of(experiment, optimizer)
        self._mix, self._batches = mix, mix.packed()
        self._dev = mix.inference(each, by_length=False)
        self._step = self._parallel.compile(step, donate=True)
        self._evaluator = Evaluator(experiment, self._parallel)
        self._state = self._parallel.put(create_state(mix.variables(), config.trainable, optimizer))

    def training(self, steps: range) -> None:
        """Takes training steps."""
        for i in steps:
            self._state, _ = self._step(self._state, self._batch(i))
        jax.block_until_ready(self._state)

    def inference(self, steps: range) -> None:
        """Predicts the examples of steps of one task, in batches as `pals-jax evaluate` makes."""
        draws = self._dev[steps.start : steps.stop]
        (task,) = {int(draw.trained_ids[0]) for draw in draws}
        split = taken(self._mix.dev[task], np.concatenate([draw.examples[0] for draw in draws]))
        self._evaluator.logits(self._state.variables, self._mix.experiment.tasks[task], split)

    def compile(self, kind: str, steps: int) -> list[tuple[int, ...]]:
        """Takes one step of each batch shape among the first `steps`; returns the shapes."""
        if kind == "inference":
            self.inference(range(1))
            experiment = self._mix.experiment
            return [(experiment.config.eval_batch_size, experiment.config.data.max_length)]
        shapes = {self._batches.place(self._mix.draw(i))[0].shape: i for i in range(steps)}
        for i in shapes.values():
            self.training(range(i, i + 1))
        return sorted(shapes)

    def loss(self, i: int) -> float:
        """The loss of a training batch of one task, without dropout."""
        batch = jax.tree.map(lambda x: x[0], self._batch(i))
        targets = batch.targets.reshape(-1)
        logits: Any = apply_to_batch(self._model, self._state.variables, batch)
        logits = logits.reshape(-1, logits.shape[-1])
        is_regression = self._mix.experiment.tasks[batch.task_ids[0]].is_regression
        regression = jnp.full(len(targets), is_regression)
        losses = example_losses(logits, targets, regression) * batch.weights.reshape(-1)
        return float(losses.sum() / batch.weights.sum())

    def _batch(self, i: int) -> Batch:
        return self._batches(self._mix.draw(i))


if __name__ == "__main__":
    main()
