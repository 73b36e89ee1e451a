"""A trained run, loaded from its workdir for evaluation and prediction."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from pals_jax.data.tasks import Task
from pals_jax.experiment import workdir as workdir_lib
from pals_jax.experiment.checkpoint import restore_best
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.evaluator import Evaluator, Results
from pals_jax.models import task_axis as tasks_lib
from pals_jax.models.shapes import variable_shapes
from pals_jax.runtime.compile_cache import keep_compiled
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Run:
    """The best checkpoint of a run, with everything needed to use it.

    Attributes:
        experiment: what the run is about.
        tokenizer: the tokenizer of the encoder.
        evaluator: the compiled evaluation.
        step: the step of the checkpoint.
        variables: the checkpoint's {"params", "adapters"}.
    """

    experiment: Experiment
    tokenizer: "PreTrainedTokenizerFast"
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
        model = experiment.model()
        shapes = variable_shapes(model)
        parallel = DataParallel.over()
        step, variables = restore_best(workdir, shapes, parallel)
        tokenizer = workdir_lib.saved_tokenizer(workdir)
        return cls(experiment, tokenizer, Evaluator(experiment, parallel), step, variables)

    def task(self, name: str) -> Task:
        """The run's task of that name.

        Raises:
            UserError: if there is none.
        """
        for task in self.experiment.tasks:
            if task.name == name:
                return task
        known = ", ".join(task.name for task in self.experiment.tasks)
        raise UserError(f"the run has no task {name!r}; its tasks are {known}.")

    def extended(self, experiment: Experiment) -> Any:
        """The variables of an experiment based on this run: its tasks, followed by new ones.

        The optimiser starts fresh, since no step will draw this run's tasks again.
        """
        params = self.variables["params"]
        new = tasks_lib.fresh(
            experiment.architecture,
            tuple(task.num_outputs for task in experiment.trained),
            experiment.model().method,
            params,
            jax.random.key(experiment.config.seed),
        )
        return {"params": params, "adapters": tasks_lib.append(self.variables["adapters"], new)}

    def evaluate(self) -> Results:
        """The dev results of every task with a known data source.

        Raises:
            UserError: if no task has one, or data are missing or invalid.
        """
        tasks = self.experiment.tasks
        known = [task for task in tasks if self.experiment.knows_data(task)] or tasks
        if others := ", ".join(task.name for task in tasks if task not in known):
            say(f"not evaluated, because they came as files without data: {others}")
        splits = {task.name: self.experiment.read_eval(task, self.tokenizer) for task in known}
        return self.evaluator.evaluate(self.variables, splits)
