"""Training: read this page from top to bottom to know what a run does."""

import contextlib
import json
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from pals_jax.convert import huggingface
from pals_jax.data import metrics
from pals_jax.data.prefetch import prefetch
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import TokenizedSplit, load_tokenizer
from pals_jax.experiment.checkpoint import restore_best
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.workdir import refuse_another_experiment
from pals_jax.inference.evaluator import Evaluator, Results, Splits, results_table
from pals_jax.inference.hidden_cache import check_same, with_hidden
from pals_jax.inference.run import Run
from pals_jax.models import counts
from pals_jax.runtime import distributed, storage
from pals_jax.runtime.compile_cache import forget_compiled, keep_compiled
from pals_jax.runtime.console import progress, say
from pals_jax.runtime.errors import Preempted, UserError
from pals_jax.runtime.parallel import DataParallel
from pals_jax.training.guards import CompilationGuard
from pals_jax.training.metric_writer import Window
from pals_jax.training.run_writer import Record
from pals_jax.training.step import TrainState, create_state
from pals_jax.training.vmapped_runs import Together, sharing

_LOG_EVERY = 10  # steps between two lines of metrics


def train(config: ConfigDict, workdir: epath.Path, base: epath.Path | None = None) -> Results:
    """Trains an experiment to its end, going on from where its workdir stands.

    Running it again after it was stopped anywhere gives the same parameters, bit for bit, as a run
    that was never stopped.

    Args:
        config: see `pals_jax.config.default`.
        workdir: receives experiment.json, tokenizer/, checkpoints/, best/, metrics.jsonl and
            tensorboard/; see `pals_jax.runtime.storage.workdir`.
        base: the workdir of a run to whose tasks those of `config` are added; they stay as they
            are, bit for bit.

    Returns:
        The dev results of the best checkpoint.

    Raises:
        Preempted: it was told to stop, and has saved where it stands.
        UserError: something in the configuration, the data or the workdir is wrong.
    """
    return train_together([config], [workdir], base)[0]


def train_together(
    configs: Sequence[ConfigDict], workdirs: Sequence[epath.Path], base: epath.Path | None = None
) -> list[Results]:
    """Trains K experiments in one step; each workdir becomes that of a run of its own.

    Args:
        configs: of which any two `can_be_trained_together`.
        workdirs: of each, as `train` has it; all stand at the same step.
        base: as `train` has it.

    Returns:
        Of each the dev results of its best checkpoint.

    Raises:
        Preempted, UserError: as `train`.
    """
    # ---------------------------------------------------------------- what is to be done
    earlier = None if base is None else Run.load(base)
    experiments = [
        Experiment.from_config(config, earlier.experiment if earlier else None)
        for config in configs
    ]
    for experiment, workdir in zip(experiments, workdirs, strict=True):
        refuse_another_experiment(experiment, workdir)
    experiment, config = experiments[0], experiments[0].config  # for what does not differ
    tasks, total_steps = experiment.trained, experiment.steps
    keep_compiled(experiment.cache_dir)

    # ---------------------------------------------------------------- weights and data
    tokenizer = earlier.tokenizer if earlier else _tokenizer(experiment)
    _check_fit(experiment, tokenizer)
    train_splits = [experiment.read(task, "train", tokenizer) for task in tasks]
    eval_splits = {task.name: experiment.read_eval(task, tokenizer) for task in tasks}
    samplers = [each.sampler([len(split) for split in train_splits]) for each in experiments]
    states = sharing(_first_state(each, earlier) for each in experiments)
    if not config.lower_dropout:
        splits = train_splits, eval_splits
        train_splits, eval_splits = with_hidden(experiment, states[0].variables, splits)

    # ---------------------------------------------------------------- steps
    parallel, together = DataParallel.over(), Together.of(experiments, states)
    batches = experiment.train_batches(train_splits, samplers[0], parallel.shards)
    step_fn = together.train_step(parallel.axis_name)
    train_step = CompilationGuard(parallel.compile(step_fn, donate=True))
    say(f"batches are {batches.placing}")
    evaluator = Evaluator(experiment, parallel)
    console = Console(stderr=True, quiet=not distributed.is_main())
    names = tuple(task.name for task in experiment.tasks)
    console.print(counts.counts_table(counts.count(experiment.model()), config.method, names))

    # ---------------------------------------------------------------- go on from where we are
    with contextlib.ExitStack() as opened, distributed.Preemption() as preemption, train_step:
        records = [
            opened.enter_context(Record(each, workdir, tokenizer, sampler, parallel))
            for each, workdir, sampler in zip(experiments, workdirs, samplers, strict=True)
        ]
        given = states[0].variables
        states = sharing(r.restore(state) for r, state in zip(records, states, strict=True))
        start = _common_step(states)
        if start:
            check_same(experiment, given, states[0].variables)
            say(f"going on from step {start} of {total_steps}")
        state = parallel.put(together.stack(states))
        del given, states  # their memory is the state's now, which the first step gives back

        # ------------------------------------------------------------ loop
        with progress(total_steps, start, "step") as bar:
            window = Window()
            make = lambda step: parallel.put_batch(batches(*together.draws(samplers, step)))  # noqa: E731
            ready = prefetch(make, range(start, total_steps))
            for done, batch in enumerate(ready, start=start + 1):
                state, scalars = train_step(state, batch)
                window.add(scalars, config.batch_size)
                bar.update()

                stop = preemption.reached(done)
                end_of_epoch = done % config.steps_per_epoch == 0
                save = stop or end_of_epoch or done % config.checkpoint_every == 0
                if save or done % _LOG_EVERY == 0:
                    scalars, rate = window.flush()
                    for record, its in zip(records, together.scalars(scalars), strict=True):
                        record.log(done, its, rate)
                    bar.set_postfix(loss=f"{scalars['loss'].mean():.3f}", refresh=False)
                if save:
                    for record, own in zip(records, together.states(state), strict=True):
                        if end_of_epoch:
                            record.evaluate(done, own.variables, evaluator, eval_splits)
                        record.save(done, own)
                    window = Window()
                if stop and done < total_steps:
                    for record in records:
                        record.checkpoints.wait()
                    raise Preempted(
                        f"told to stop; step {done} of {total_steps} is saved in"
                        f" {', '.join(map(str, workdirs))}. Run the same command to go on."
                    )

    # ---------------------------------------------------------------- result
    say(f"the training step was compiled {train_step.count} times")
    shapes, of_all = next(together.states(state)).variables, []
    for workdir in workdirs:
        step, variables = restore_best(workdir, shapes, parallel)
        results = evaluator.evaluate(variables, eval_splits)
        console.print(results_table(tasks, results, _baselines(tasks, train_splits, eval_splits)))
        say(f"the best checkpoint, of step {step}, is in {workdir / 'best'}; use it with")
        say(f"  pals-jax predict --workdir={workdir} --task={tasks[0].name}")
        of_all.append(results)
    return of_all


def train_separately(config: ConfigDict, workdir: epath.Path) -> Results:
    """Trains one model for each task alone, in `workdir/TASK`; one table and file for all.

    The rival of sharing (Stickland & Murray, table 1: "separate", 8 times the parameters). Each
    task takes all the configuration's steps.

    Returns:
        The dev results of every task's best checkpoint.
    """
    tasks = Experiment.from_config(config).tasks  # refuses what is wrong before any is trained
    results: Results = {}
    for name in config.tasks:
        alone = ConfigDict(config.to_dict())
        alone.tasks = (name,)
        results |= train(alone, workdir / name)
        forget_compiled()
    if distributed.is_main():
        Console(stderr=True).print(results_table(tasks, results))
        storage.write_text(workdir / "results.json", json.dumps(results, indent=1))
    return results


def _tokenizer(experiment: Experiment) -> PreTrainedTokenizerFast:
    return load_tokenizer(huggingface.resolve(experiment.config.encoder))


def _first_state(experiment: Experiment, earlier: Run | None) -> TrainState:
    """The state before the first step."""
    config = experiment.config
    if earlier is None:
        encoder = huggingface.resolve(config.encoder)
        variables = huggingface.load_variables(experiment.model(), encoder, config.seed)
    else:
        variables = earlier.extended(experiment)
    optimizer, _ = experiment.optimizer()
    return create_state(variables, config.trainable, optimizer)


def _common_step(states: Sequence[TrainState]) -> int:
    """At which all stand.

    Raises:
        UserError: they do not.
    """
    steps = {int(state.step) for state in states}
    if len(steps) > 1:
        raise UserError(
            f"the runs of the sweep stand at different steps, {sorted(steps)}, since a checkpoint"
            " was damaged; run the same command again, and they are trained apart."
        )
    return steps.pop()


def _check_fit(experiment: Experiment, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses a tokenizer or a length that the encoder has no embeddings for."""
    architecture, max_length = experiment.architecture, experiment.config.data.max_length
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"the tokenizer of {experiment.config.encoder} has {len(tokenizer)} tokens, its"
            f" embedding only {architecture.vocab_size}; use the tokenizer of the weights."
        )
    if max_length > architecture.max_length:
        raise UserError(
            f"configuration: data.max_length {max_length} is above the encoder's position table"
            f" of {architecture.max_length}; shorten it."
        )


def _baselines(tasks: Sequence[Task], train: Sequence[TokenizedSplit], evals: Splits) -> Results:
    """What always answering with the most frequent class, or the mean, of the train set gives."""
    return {
        task.name: {
            name: metrics.majority_baseline(
                task.metrics, split.targets, held_out.targets, task.is_regression
            )
            for name, held_out in evals[task.name].items()
        }
        for task, split in zip(tasks, train, strict=True)
    }
