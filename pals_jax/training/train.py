"""Training: read this page from top to bottom to know what a run does."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pals_jax.convert import huggingface
from pals_jax.data import metrics
from pals_jax.data.batch import Batch
from pals_jax.data.batches import TrainBatches
from pals_jax.data.prefetch import prefetch
from pals_jax.data.tasks import Task
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment.checkpoint import best_results
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.families import Tokenizer
from pals_jax.experiment.workdir import refuse_another_experiment
from pals_jax.inference.evaluator import Evaluator, Results, Splits, results_table
from pals_jax.inference.hidden_cache import check_same, with_hidden
from pals_jax.inference.run import Run
from pals_jax.inference.text_generation import generation_config
from pals_jax.models import counts
from pals_jax.runtime import distributed, storage
from pals_jax.runtime.compile_cache import forget_compiled, keep_compiled
from pals_jax.runtime.console import print_table, progress, say
from pals_jax.runtime.errors import Preempted, UserError
from pals_jax.runtime.parallel import DataParallel, Step
from pals_jax.training.guards import CompilationGuard
from pals_jax.training.metric_writer import Window
from pals_jax.training.run_writer import RunWriter
from pals_jax.training.step import TrainState, create_state, train_step_of

_LOG_EVERY = 10  # steps between two lines of metrics


def train(config: ConfigDict, workdir: epath.Path, base: epath.Path | None = None) -> Results:
    """Trains an experiment to its end, resuming from its workdir's newest checkpoint.

    A run that was stopped anywhere and run again gets the same parameters, bit for bit, as a run
    that was never stopped.

    Args:
        config: see `pals_jax.config.default`.
        workdir: receives experiment.json, tokenizer/, checkpoints/, best/, metrics.jsonl and
            tensorboard/; see `pals_jax.runtime.storage.workdir`.
        base: the workdir of an earlier run; the tasks of `config` are added to its tasks, which
            stay unchanged, bit for bit.

    Returns:
        The dev results of the best checkpoint.

    Raises:
        Preempted: the run was told to stop, and has saved its state.
        UserError: something in the configuration, the data or the workdir is wrong.
    """
    # ---------------------------------------------------------------- the experiment
    earlier = None if base is None else Run.load(base)
    experiment = Experiment.from_config(config, earlier.experiment if earlier else None)
    refuse_another_experiment(experiment, workdir)
    keep_compiled(experiment.cache_dir)

    # ---------------------------------------------------------------- data and weights
    data = read_data(experiment, earlier)
    sampler = experiment.sampler(data.sizes)
    state = first_state(experiment, earlier)
    data = data.with_hidden(experiment, state)

    # ---------------------------------------------------------------- steps
    devices = DataParallel.over()
    parallel = devices.dividing(state.trainable)
    batches = experiment.train_batches(data.train, sampler, devices.shards)
    optimizer, _ = experiment.optimizer(division=parallel.division)
    train_step = train_step_of(experiment, optimizer, parallel.division)
    evaluator = Evaluator(experiment, devices)
    describe(experiment, batches)

    # ---------------------------------------------------------------- the loop
    with RunWriter(experiment, workdir, data.tokenizer, sampler, parallel) as writer:
        given = state.variables
        state = writer.restore(state)
        if int(state.step):
            check_same(experiment, given, state.variables)
        writer.keep_exact(state)
        state = state.in_compute_dtype(experiment.model().dtype)
        del given  # the state owns this memory from here on; the first step donates it
        take_steps(
            experiment,
            parallel.compile(train_step, donate=True, like=state),
            state,
            lambda step: parallel.put_batch(batches(sampler.draw(step))),
            writer,
            lambda done, state: writer.evaluate(done, state, evaluator, data.evals),
        )

    # ---------------------------------------------------------------- result
    return report(experiment, workdir, data)


class Writer(Protocol):
    """The outputs of `take_steps`, for a run or several runs in one step: see `RunWriter`."""

    def log(self, done: int, scalars: dict[str, np.ndarray], rate: float) -> None:
        """Writes the figures of the last steps."""

    def save(self, done: int, state: TrainState) -> None:
        """Writes a checkpoint."""

    def wait(self) -> None:
        """Returns when all checkpoints are on disk."""

    @property
    def where(self) -> str:
        """The workdir, or workdirs."""


def take_steps(
    experiment: Experiment,
    step: Step,
    state: TrainState,
    make_batch: Callable[[int], Batch],
    writer: Writer,
    evaluate: Callable[[int, TrainState], None],
) -> None:
    """The training loop, from the step of `state` to the end of the run.

    Args:
        experiment: gives the number of steps, and when to save and evaluate.
        step: the compiled training step; it donates the state.
        state: the state to start from.
        make_batch: makes the batch of a step, given its number; called ahead on another thread.
        writer: receives figures and checkpoints.
        evaluate: called with the number of steps taken and the state at the end of each epoch.

    Raises:
        Preempted: the run was told to stop, and has saved its state.
        UserError: the training has diverged, or the workdir cannot be written.
    """
    config, total_steps, start = experiment.config, experiment.steps, int(state.step)
    if start:
        say(f"going on from step {start} of {total_steps}")
    with (
        distributed.Preemption() as preemption,
        CompilationGuard(step) as train_step,
        progress(total_steps, start, "step") as bar,
    ):
        window = Window()
        for done, batch in enumerate(prefetch(make_batch, range(start, total_steps)), start + 1):
            state, scalars = train_step(state, batch)
            window.add(scalars, config.batch_size)
            bar.update()

            stop = preemption.reached(done)
            end_of_epoch = done % config.steps_per_epoch == 0
            save = stop or end_of_epoch or done % config.checkpoint_every == 0
            if save or done % _LOG_EVERY == 0:
                scalars, rate = window.flush()
                writer.log(done, scalars, rate)
                bar.set_postfix(loss=f"{scalars['loss'].mean():.3f}", refresh=False)
            if save:
                if end_of_epoch:
                    evaluate(done, state)
                writer.save(done, state)
                window = Window()  # the time of saving must not count in the steps' rate
            if stop and done < total_steps:
                writer.wait()
                raise Preempted(
                    f"told to stop; step {done} of {total_steps} is saved in {writer.where}; to go"
                    " on, run the same command again."
                )
    say(f"the training step was compiled {train_step.count} times")


def train_separately(config: ConfigDict, workdir: epath.Path) -> Results:
    """Trains a separate model for each task, in `workdir/TASK`; writes one table and one file.

    This is the baseline without sharing (Stickland & Murray, table 1: "separate", 8 times the
    parameters). Each task gets all the configuration's steps.

    Returns:
        The dev results of every task's best checkpoint.
    """
    tasks = Experiment.from_config(config).tasks  # reports errors before any task is trained
    results: Results = {}
    for name in config.tasks:
        distributed.stop_between_runs()
        alone = ConfigDict(config.to_dict())
        alone.tasks = (name,)
        results |= train(alone, workdir / name)
        forget_compiled()
    if distributed.is_main():
        print_table(results_table(tasks, results))
        storage.write_text(workdir / "results.json", json.dumps(results, indent=1))
    return results


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        tokenizer: the tokenizer of the model.
        train: the training examples of each trained task, in their order.
        evals: the evaluation splits of each trained task.
    """

    tokenizer: Tokenizer
    train: list[TokenizedSplit]
    evals: Splits

    @property
    def sizes(self) -> list[int]:
        """The number of training examples of each task."""
        return [len(split) for split in self.train]

    def with_hidden(self, experiment: Experiment, state: TrainState) -> "Data":
        """The data with cached hidden states, if the configuration asks for them."""
        if experiment.config.lower_dropout:
            return self
        train, evals = with_hidden(experiment, state.variables, (self.train, self.evals))
        return dataclasses.replace(self, train=train, evals=evals)


def read_data(experiment: Experiment, earlier: Run | None = None) -> Data:
    """Reads and tokenises the experiment's training and evaluation data.

    Raises:
        UserError: the data are missing or wrong, or the tokenizer does not fit the encoder.
    """
    tokenizer = earlier.tokenizer if earlier else experiment.load_tokenizer()
    _check_fit(experiment, tokenizer)
    return Data(
        tokenizer,
        [experiment.read(task, "train", tokenizer) for task in experiment.trained],
        {task.name: experiment.read_eval(task, tokenizer) for task in experiment.trained},
    )


def first_state(experiment: Experiment, earlier: Run | None = None) -> TrainState:
    """The state before the first step."""
    config = experiment.config
    if earlier is None:
        encoder = huggingface.resolve(config.encoder)
        variables = huggingface.load_variables(experiment.model(), encoder, config.seed)
    else:
        variables = earlier.extended(experiment)
    optimizer, _ = experiment.optimizer()
    return create_state(variables, config.trainable, optimizer)


def describe(experiment: Experiment, batches: TrainBatches) -> None:
    """Prints the shapes of batches and the numbers of parameters."""
    say(f"batches are {batches.placing}")
    names = tuple(task.name for task in experiment.tasks)
    counted = counts.count(experiment.model())
    print_table(counts.counts_table(counted, experiment.config.method, names))


def report(experiment: Experiment, workdir: epath.Path, data: Data) -> Results:
    """Prints the results of the best checkpoint of a finished run, and how to use it."""
    tasks = experiment.trained
    step, results = best_results(workdir)
    print_table(results_table(tasks, results, _baselines(tasks, data.train, data.evals)))
    say(f"the best checkpoint, of step {step}, is in {workdir / 'best'}; use it with")
    say(f"  pals-jax predict --workdir={workdir} --task={tasks[0].name}")
    return results


def _check_fit(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer or a length for which the model has no embeddings."""
    architecture = experiment.architecture
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"the tokenizer of {experiment.config.encoder} has {len(tokenizer)} tokens, but the"
            f" encoder's embedding has only {architecture.vocab_size}; use the tokenizer of the"
            " weights."
        )
    for name, length in experiment.family.max_lengths(experiment.config.data).items():
        if length > architecture.max_length:
            part = "decoder" if name == "max_target_length" else "encoder"
            raise UserError(
                f"configuration: data.{name} {length} is above the {part}'s position table"
                f" of {architecture.max_length}; shorten it."
            )
    if experiment.tasks[0].output == "text":
        generation_config(experiment, tokenizer)  # raises for what is wrong


def _baselines(tasks: Sequence[Task], train: Sequence[TokenizedSplit], evals: Splits) -> Results:
    """The scores of always predicting the most frequent class, or the mean, of the train set.

    Tasks with texts for answers have none.
    """
    return {
        task.name: {
            name: metrics.majority_baseline(
                task.metrics, split.targets, held_out.targets, task.is_regression
            )
            for name, held_out in evals[task.name].items()
        }
        for task, split in zip(tasks, train, strict=True)
        if task.output != "text"
    }
