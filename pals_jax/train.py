"""Training: read this page from top to bottom to know what a run does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from pals_jax import evaluate, metrics, params
from pals_jax.checkpoint import Checkpoints, restore_best
from pals_jax.convert import huggingface
from pals_jax.data.batches import train_batch
from pals_jax.data.sampler import Sampler
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import TokenizedSplit, load_tokenizer
from pals_jax.errors import UserError
from pals_jax.evaluate import Evaluator, Results
from pals_jax.experiment import Experiment
from pals_jax.logging import MetricWriter, Window, progress, say
from pals_jax.optim import make_optimizer
from pals_jax.run import TOKENIZER, Run
from pals_jax.step import create_state, make_train_step

_LOG_EVERY = 10  # steps between two lines of metrics


def train(config: ConfigDict, workdir: Path, base: Path | None = None) -> Results:
    """Trains an experiment to its end, going on from where its workdir stands.

    Running it again after it was stopped anywhere gives the same parameters, bit for bit, as a run
    that was never stopped.

    Args:
        config: see `pals_jax.config.default`.
        workdir: receives experiment.json, tokenizer/, checkpoints/, best/, metrics.jsonl and
            tensorboard/.
        base: the workdir of a run to whose tasks those of `config` are added; they stay as they
            are, bit for bit.

    Returns:
        The dev results of the best checkpoint.

    Raises:
        UserError: something in the configuration, the data or the workdir is wrong.
    """
    # ---------------------------------------------------------------- what is to be done
    earlier = None if base is None else Run.load(base)
    experiment = Experiment.from_config(config, earlier.experiment if earlier else None)
    experiment.check(workdir)
    tasks, model = experiment.trained, experiment.model()
    num_tasks = len(experiment.tasks)
    counts = params.count(model)
    total_steps = config.epochs * config.steps_per_epoch
    optimizer, schedule = make_optimizer(config.optimizer, num_tasks, total_steps)

    # ---------------------------------------------------------------- weights and data
    tokenizer, variables = _begin(experiment, earlier)
    _check_fit(experiment, tokenizer)
    train_splits = [experiment.read(task, "train", tokenizer) for task in tasks]
    eval_splits = {task.name: experiment.read_eval(task, tokenizer) for task in tasks}
    sampler = Sampler(
        sizes=tuple(len(split) for split in train_splits),
        schedule=config.sampling,
        seed=config.seed,
        epochs=config.epochs,
        steps_per_epoch=config.steps_per_epoch,
        groups=config.groups,
        group_size=config.batch_size // config.groups,
    )

    # ---------------------------------------------------------------- steps
    state = create_state(variables, config.trainable, optimizer)
    train_step = jax.jit(make_train_step(model, optimizer, config.seed), donate_argnums=0)
    evaluator = Evaluator(experiment)
    console = Console(stderr=True)
    names = tuple(task.name for task in experiment.tasks)
    console.print(params.table(counts, config.method, names))

    # ---------------------------------------------------------------- go on from where we are
    experiment.save(workdir)
    tokenizer.save_pretrained(workdir / TOKENIZER)
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(state)
    start = int(state.step)
    if start:
        say(f"going on from step {start} of {total_steps}")

    # ---------------------------------------------------------------- loop
    with MetricWriter(workdir, start) as writer, progress(total_steps, start, "step") as bar:
        window = Window()
        for step in range(start, total_steps):
            draw = sampler.draw(step)
            batch = train_batch(train_splits, draw, experiment.layout, num_tasks - len(tasks))
            state, scalars = train_step(state, batch)
            window.add(scalars, config.batch_size)
            bar.update()

            done = step + 1
            end_of_epoch = done % config.steps_per_epoch == 0
            if done % _LOG_EVERY == 0 or end_of_epoch:
                line = window.flush() | {"learning_rate": float(schedule(step))}
                writer.write(done, line)
                bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            if end_of_epoch:
                results = evaluator.evaluate(state.variables, eval_splits)
                score = evaluator.score(results)
                writer.write(done, flatten_dict(results, sep="/") | {"score": score})
                say(f"epoch {done // config.steps_per_epoch} of {config.epochs}: {score:.4f}")
                checkpoints.save_best(done, state.variables, score)
                window = Window()
            if end_of_epoch or done % config.checkpoint_every == 0:
                checkpoints.save(done, state)

    # ---------------------------------------------------------------- result
    step, variables = restore_best(workdir, state.variables)
    results = evaluator.evaluate(variables, eval_splits)
    baselines = _baselines(tasks, train_splits, eval_splits)
    console.print(evaluate.table(tasks, results, baselines))
    say(f"the best checkpoint, of step {step}, is in {workdir / 'best'}; use it with")
    say(f"  pals-jax predict --workdir={workdir} --task={tasks[0].name}")
    return results


def train_separately(config: ConfigDict, workdir: Path) -> Results:
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
    Console(stderr=True).print(evaluate.table(tasks, results))
    (workdir / "results.json").write_text(json.dumps(results, indent=1))
    return results


def _begin(
    experiment: Experiment, earlier: Run | None
) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The tokenizer, and the variables before the first step."""
    if earlier is not None:
        return earlier.tokenizer, earlier.extended(experiment)
    config, encoder = experiment.config, huggingface.resolve(experiment.config.encoder)
    tokenizer = load_tokenizer(encoder)
    return tokenizer, huggingface.load_variables(experiment.model(), encoder, config.seed)


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


def _baselines(
    tasks: Sequence[Task], train: Sequence[TokenizedSplit], evals: evaluate.Splits
) -> Results:
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
