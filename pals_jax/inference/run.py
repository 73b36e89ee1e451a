"""A run in memory: one model with its tasks, which predicts, evaluates, and takes more tasks."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from pals_jax.convert import task_file
from pals_jax.convert.task_file import Base
from pals_jax.data.examples import Examples
from pals_jax.data.pairs import PairTokenizer
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import TextEncoder
from pals_jax.experiment import workdir as workdir_lib
from pals_jax.experiment.checkpoint import BEST, Checkpoints, restore_best
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.families import Tokenizer
from pals_jax.inference import predict as predict_lib
from pals_jax.inference.evaluator import Evaluator, Results
from pals_jax.inference.predict import Predictions
from pals_jax.inference.text_generation import TextGenerator
from pals_jax.inference.texts import Texts, fit, from_python, is_frame
from pals_jax.models import task_axis
from pals_jax.models.adapters import serialize
from pals_jax.models.adapters.parse import parse_method
from pals_jax.models.merge import flat_prefixes
from pals_jax.models.shapes import variable_shapes
from pals_jax.runtime import storage
from pals_jax.runtime.compile_cache import keep_compiled
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError, reason
from pals_jax.runtime.parallel import DataParallel

ALL = "all"  # the name that stands for every task


@dataclasses.dataclass(eq=False)
class Run:
    """One encoder, or encoder-decoder, with its tasks. `pals_jax.load` makes it.

    `add` and `remove` change it; do not call them while another thread predicts.

    Attributes:
        experiment: what the run is about.
        tokenizer: the tokenizer of the model.
        evaluator: the compiled steps.
        step: the training step of the checkpoint; 0 if it is not known.
        variables: {"params", "adapters"}, float32; every leaf of "adapters" leads with the task
            axis.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    evaluator: Evaluator
    step: int
    variables: Any

    @classmethod
    def load(cls, workdir: epath.Path) -> "Run":
        """The best checkpoint of a workdir.

        Raises:
            UserError: if there is no run, no checkpoint yet, or the checkpoint is damaged.
        """
        experiment = workdir_lib.load(workdir)
        keep_compiled(experiment.cache_dir)
        parallel = DataParallel.over()
        step, variables = restore_best(workdir, variable_shapes(experiment.model()), parallel)
        tokenizer = workdir_lib.saved_tokenizer(experiment, workdir)
        return cls(experiment, tokenizer, Evaluator(experiment, parallel), step, variables)

    @classmethod
    def of(cls, experiment: Experiment, tokenizer: Tokenizer, variables: Any) -> "Run":
        """A run of variables that come from elsewhere, on all devices."""
        keep_compiled(experiment.cache_dir)
        parallel = DataParallel.over()
        evaluator = Evaluator(experiment, parallel)
        return cls(experiment, tokenizer, evaluator, 0, parallel.put(variables))

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name, in the order of the task axis."""
        return {task.name: task for task in self.experiment.tasks}

    def task(self, name: str) -> Task:
        """The run's task of that name.

        Raises:
            UserError: if there is none.
        """
        if name in self.tasks:
            return self.tasks[name]
        known = ", ".join(self.tasks)
        raise UserError(f"the run has no task {name!r}; its tasks are {known}.")

    def chosen(self, name: str | None) -> list[Task]:
        """The task of that name, all tasks for "all", or the only task for None.

        Raises:
            UserError: if there is no such task, or no name where there are several tasks.
        """
        if name is None and len(self.tasks) > 1:
            raise UserError(f"the run has several tasks; choose one of {', '.join(self.tasks)}.")
        every = list(self.experiment.tasks)
        return every if name in (None, ALL) and name not in self.tasks else [self.task(str(name))]

    @functools.cached_property
    def base(self) -> Base:
        """The run's encoder or encoder-decoder, on which more tasks may be added."""
        return Base(self.experiment.architecture, self.variables["params"], self.tokenizer)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """Makes tokens of texts, for an encoder.

        Raises:
            UserError: if the run is of an encoder-decoder.
        """
        if isinstance(self.tokenizer, PairTokenizer):
            raise UserError(
                "the tasks of this run are answered with texts; predict and evaluate can do that,"
                " and this is for encoders only, whose tasks have heads."
            )
        return TextEncoder(self.tokenizer, self.experiment.config.data.max_length)

    @functools.cached_property
    def text_generator(self) -> TextGenerator:
        """Generates texts, with an encoder-decoder."""
        assert isinstance(self.tokenizer, PairTokenizer)
        return TextGenerator(self.experiment, self.tokenizer, self.evaluator.parallel)

    def predict(self, texts: Texts, task: str | None = None) -> Predictions:
        """The predictions of one task, or of all tasks that the texts fit.

        The first call for a shape of batch compiles a program, or reads it from the disk; the
        shapes are few, so later calls do not. A text beyond the run's maximum length is truncated.
        An encoder-decoder generates texts, as `experiment.config.generation` has it.

        Args:
            texts: N examples: a str or a pair (a tuple of two str) for one; a list or other
                iterable of either; or a pandas data frame with the task's text columns.
            task: the name of a task, or "all"; may be left out if the run has one task.

        Returns:
            N predictions, or N times the number of fitting tasks: see `Predictions`.

        Raises:
            UserError: if there is no such task or no text, the texts do not fit the task, or the
                task came without a head.
        """
        index = texts.index if is_frame(texts) else None  # type: ignore[union-attr]
        return predict_lib.predict(self, self.chosen(task), from_python(texts), index)

    def encode(self, texts: Texts, task: str | None = None) -> np.ndarray:
        """The vectors that a task's head reads: the pooled output of the encoder and the adapters.

        If the encoder's checkpoint lacks a pooler, as `load` then says, that layer is random.

        Args:
            texts: N examples, as for `predict`.
            task: the name of a task; may be left out if the run has one task.

        Returns:
            float32 [N, D].

        Raises:
            UserError: as for `predict`, or for "all".
        """
        if len(tasks := self.chosen(task)) > 1:
            raise UserError("each task has its own vectors; call encode with one task at a time.")
        split = self.text_encoder(Examples(fit(tasks, from_python(texts)).texts, None))
        return self.evaluator.vectors(self.variables, tasks[0], split)

    def evaluate(self) -> Results:
        """The dev results of every task with a known data source.

        Of an encoder-decoder, ROUGE and BLEU of the texts that it generates too.

        Returns:
            {task: {split: {metric: value}}}.

        Raises:
            UserError: if no task has one, or data are missing or invalid.
        """
        tasks = self.experiment.tasks
        headed = [task for task in tasks if task.has_head]
        known = [task for task in headed if self.experiment.knows_data(task)] or headed
        if not known:
            raise UserError("no task of the run has a head to evaluate; load one that has.")
        if others := ", ".join(task.name for task in tasks if task not in known):
            say(f"not evaluated, as they came as files without data, or without a head: {others}")
        splits = {task.name: self.experiment.read_eval(task, self.tokenizer) for task in known}
        results = self.evaluator.evaluate(self.variables, splits)
        for task in (task for task in known if task.output == "text"):
            for split, examples in self.experiment.eval_examples(task).items():
                scores = self.text_generator.scores(self.variables, task, examples)
                results[task.name][split].update(scores)
        return results

    def add(self, file: str | Path) -> None:
        """Adds the task of a task file, last on the task axis; the others keep their parameters.

        Texts are truncated to the largest of the tasks' maximum lengths. If that grows, the answers
        of all tasks to longer texts may change, which is said.

        Args:
            file: a task file of this run's encoder and method.

        Raises:
            UserError: if it is not a task file or is damaged, belongs to another encoder, has
                another method, or holds a task whose name the run has already.
        """
        # Task files hold prefixes without their networks.
        method, adapters = flat_prefixes(self._method, self.variables["adapters"])
        loaded = task_file.load_another(Path(file), self.base, method)
        (task,) = loaded.tasks
        if task.name in self.tasks:
            raise UserError(
                f"{file} holds a task {task.name!r}, which the run has already; remove that first."
            )
        config = self.experiment.config.copy_and_resolve_references()
        if method != self._method:
            config.method = serialize.dumps(method)
        for name, length in loaded.max_lengths.items():
            if length > config.data[name]:
                what = "targets" if name == "max_target_length" else "texts"
                say(
                    f"all {what} are now truncated at {length} tokens, as {task.name} was"
                    f" trained, rather than at {config.data[name]}"
                )
                config.data[name] = length
        adapters = task_axis.append(adapters, loaded.variables["adapters"])
        self._become(config, (*self.experiment.tasks, task), adapters)

    def remove(self, task: str) -> None:
        """Removes a task; the others stay as they are.

        Raises:
            UserError: if there is no such task, or it is the only one.
        """
        removed = self.task(task)
        if len(self.tasks) == 1:
            raise UserError(f"{task} is the run's only task; a run has at least one.")
        tasks = self.experiment.tasks
        kept = [i for i, each in enumerate(tasks) if each is not removed]
        num_outputs = [each.num_outputs for each in tasks]
        adapters = task_axis.take(self.variables["adapters"], num_outputs, kept)
        config = self.experiment.config.copy_and_resolve_references()
        if task in config.data.own:
            with config.unlocked():
                del config.data.own[task]
        self._become(config, tuple(tasks[i] for i in kept), adapters)

    def save(self, place: str | Path | epath.Path) -> None:
        """Writes a workdir, which `load` and the command line can read.

        Args:
            place: a directory or `gs://BUCKET/DIR` that holds no run.

        Raises:
            UserError: if it holds a run, or cannot be written.
        """
        workdir = storage.workdir(str(place))
        if (workdir / workdir_lib.EXPERIMENT_FILE).exists():
            raise UserError(f"{workdir} holds a run already; choose another workdir.")
        try:
            if (left := workdir / BEST).exists():  # by an attempt that failed
                left.rmtree()
            with Checkpoints(workdir, self.evaluator.parallel) as checkpoints:
                checkpoints.save_best(self.step, self.variables, 0.0, {}, {})
            workdir_lib.save_tokenizer(self.tokenizer, workdir)
            workdir_lib.save(self.experiment, workdir)  # last: this file makes it a run
        except OSError as error:
            raise UserError(f"cannot write the run to {workdir}: {reason(error)}.") from error

    @property
    def _method(self) -> Any:
        return parse_method(self.experiment.config.method)

    def _become(self, config: Any, tasks: Sequence[Task], adapters: Mapping[str, Any]) -> None:
        """Takes other tasks, with the rows of the task axis that are theirs."""
        config.tasks = tuple(task.name for task in tasks)
        self.experiment = Experiment(config, tuple(tasks), self.experiment.architecture)
        self.evaluator = Evaluator(self.experiment, self.evaluator.parallel)
        put = self.evaluator.parallel.put(dict(adapters))
        self.variables = {"params": self.variables["params"], "adapters": put}
        for outdated in ("text_encoder", "text_generator"):
            self.__dict__.pop(outdated, None)

    def extended(self, experiment: Experiment) -> Any:
        """The variables of an experiment based on this run: its tasks, followed by new ones.

        The optimiser starts fresh, since no step will draw this run's tasks again.
        """
        params = self.variables["params"]
        new = task_axis.fresh(
            experiment.architecture,
            tuple(task.num_outputs for task in experiment.trained),
            experiment.model().method,
            params,
            jax.random.key(experiment.config.seed),
        )
        return {"params": params, "adapters": task_axis.append(self.variables["adapters"], new)}
