"""Evaluation of every task on complete dev sets: the papers' metrics, or the loss of texts."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pals_jax.data import metrics
from pals_jax.data.batch import Batch
from pals_jax.data.tasks import Task
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.steps import (
    make_eval_step,
    make_every_task_step,
    make_pool_step,
    make_text_loss_step,
)
from pals_jax.models.compute_dtype import in_compute_dtype
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import Diverged
from pals_jax.runtime.parallel import DataParallel

if TYPE_CHECKING:
    from rich.table import Table

Results = dict[str, dict[str, dict[str, float]]]  # task -> split -> metric
Splits = Mapping[str, Mapping[str, TokenizedSplit]]  # task -> split
Predictions = dict[str, dict[str, np.ndarray]]  # task -> split -> [N]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates an experiment with a compiled step.

    Attributes:
        experiment: the experiment to evaluate.
        parallel: the devices, over which every batch is divided. Each host gets the results of all
            examples.
    """

    experiment: Experiment
    parallel: DataParallel

    @functools.cached_property
    def eval_step(self) -> Callable[..., jax.Array]:
        """`steps.make_eval_step`, compiled once per shape of batch."""
        step = make_eval_step(self.experiment.encoder(), self.parallel.axis_name)
        return self.parallel.compile(step)

    @functools.cached_property
    def every_task_step(self) -> Callable[..., jax.Array]:
        """`steps.make_every_task_step`, compiled once per shape of batch."""
        step = make_every_task_step(self.experiment.encoder(), self.parallel.axis_name)
        return self.parallel.compile(step)

    @functools.cached_property
    def pool_step(self) -> Callable[..., jax.Array]:
        """`steps.make_pool_step`, compiled once per shape of batch."""
        step = make_pool_step(self.experiment.encoder(), self.parallel.axis_name)
        return self.parallel.compile(step)

    @functools.cached_property
    def text_loss_step(self) -> Callable[..., jax.Array]:
        """`steps.make_text_loss_step`, compiled once per shape of batch."""
        model = self.experiment.model()
        assert isinstance(model, Seq2SeqModel)
        return self.parallel.compile(make_text_loss_step(model, self.parallel.axis_name))

    def logits(
        self,
        variables: Any,
        task: Task,
        split: TokenizedSplit,
        active: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits float32 [examples, C_task] of every example, in the split's order.

        With `active`, bool [N], only the layers where it is True have their adapters.
        """
        task_id = self.experiment.tasks.index(task)
        batches = self.experiment.eval_batches(split, task_id, self.parallel.shards)
        out = _of_examples(lambda batch: self.eval_step((variables, active), batch), batches)
        return finite(task, out[:, : task.num_outputs])

    def answers(
        self, variables: Any, tasks: Sequence[Task], split: TokenizedSplit
    ) -> list[np.ndarray]:
        """The logits of any number of examples for each of `tasks`, each as `logits` returns it.

        Batches have few shapes (`Experiment.answer_batches`): one short text costs one short row,
        and repeated calls compile nothing. For several tasks, the layers below their first adapters
        are computed once.
        """
        ids = [self.experiment.tasks.index(task) for task in tasks]
        batches = self.experiment.answer_batches(split, ids[0], self.parallel.shards)
        if len(tasks) == 1:
            out = _of_examples(lambda batch: self.eval_step((variables, None), batch), batches)
            return [finite(tasks[0], out[:, : tasks[0].num_outputs])]
        out = _of_examples(
            lambda batch: np.moveaxis(np.asarray(self.every_task_step(variables, batch)), 0, 2),
            batches,
        )
        pairs = zip(ids, tasks, strict=True)
        return [finite(task, out[:, i, : task.num_outputs]) for i, task in pairs]

    def vectors(self, variables: Any, task: Task, split: TokenizedSplit) -> np.ndarray:
        """float32 [examples, D]: what the task's head reads, in the split's order."""
        task_id = self.experiment.tasks.index(task)
        batches = self.experiment.answer_batches(split, task_id, self.parallel.shards)
        out = _of_examples(lambda batch: self.pool_step(variables, batch), batches)
        return finite(task, out.astype(np.float32))

    def text_losses(self, variables: Any, task: Task, split: TokenizedSplit) -> np.ndarray:
        """float32 [examples]: the sum over each target's tokens of -log p(token), in order."""
        task_id = self.experiment.tasks.index(task)
        batches = self.experiment.eval_batches(split, task_id, self.parallel.shards)
        return finite(task, _of_examples(lambda b: self.text_loss_step(variables, b), batches))

    def evaluate(self, variables: Any, splits: Splits, active: np.ndarray | None = None) -> Results:
        """The metrics of every task of `splits` on each split, over the whole split at once."""
        return self.measure(self.predict(variables, splits, active), splits)

    def predict(
        self, variables: Any, splits: Splits, active: np.ndarray | None = None
    ) -> Predictions:
        """`decide`'s answer for every example of every task of `splits`; of texts, `text_losses`.

        With `active`, bool [N], only the layers where it is True have their adapters.
        """
        variables = in_compute_dtype(variables, self.experiment.model().dtype)

        def of_split(task: Task, split: TokenizedSplit) -> np.ndarray:
            if split.target_texts is not None:
                return self.text_losses(variables, task, split)
            return decide(task, self.logits(variables, task, split, active))

        return {
            task.name: {name: of_split(task, split) for name, split in splits[task.name].items()}
            for task in self.experiment.tasks
            if task.name in splits
        }

    def measure(self, predictions: Predictions, splits: Splits) -> Results:
        """The metrics of what `predict` returned for the same splits."""

        def of_split(task: Task, predicted: np.ndarray, split: TokenizedSplit) -> dict[str, float]:
            if split.target_texts is not None:
                return metrics.of_texts(task.metrics, predicted, split.target_texts.lengths)
            return metrics.compute(task.metrics, predicted, split.targets)

        return {
            task.name: {
                name: of_split(task, predicted, splits[task.name][name])
                for name, predicted in predictions[task.name].items()
            }
            for task in self.experiment.tasks
            if task.name in predictions
        }

    def score(self, results: Results) -> float:
        """The score that selects the best checkpoint: see `metrics.selection_score`."""
        named = {t.name: t.metrics for t in self.experiment.tasks if t.name in results}
        return metrics.selection_score(named, results)


def _of_examples(
    step: Callable[[Batch], Any], batches: Iterable[tuple[Batch, np.ndarray]]
) -> np.ndarray:
    """What a step gives, [B, M, ...], for every example of some batches: [examples, ...]."""
    found, values = [], []
    for batch, examples in batches:
        found.append(examples[examples >= 0])
        values.append(np.asarray(step(batch))[examples >= 0])
    order = np.argsort(np.concatenate(found))
    return np.concatenate(values)[order]


def finite(task: Task, outputs: np.ndarray) -> np.ndarray:
    """The outputs; raises Diverged if they are not finite."""
    if not np.isfinite(outputs).all():
        raise Diverged(
            f"task {task.name}: the model's outputs are not finite; the training has diverged,"
            " lower optimizer.learning_rate."
        )
    return outputs


def decide(task: Task, logits: np.ndarray) -> np.ndarray:
    """The predictions [N]: class ids, or regression values; in a range, clipped to [0, 1]."""
    if not task.is_regression:
        return logits.argmax(-1)
    return logits[:, 0] if task.label_range is None else np.clip(logits[:, 0], 0.0, 1.0)


def results_table(
    tasks: Sequence[Task], results: Results, baselines: Results | None = None
) -> "Table":
    """A table of results, next to the majority baselines if they are given; see `metrics.shown`."""
    from rich.table import Table

    unscaled = [name for name in metrics.TEXT_METRICS if any(name in t.metrics for t in tasks)]
    but = f", but for {' and '.join(unscaled)}" if unscaled else ""
    rows = Table(title=f"dev scores (x 100{but})", title_justify="left")
    for name in ("task", "split", "metric"):
        rows.add_column(name)
    rows.add_column("score", justify="right")
    if baselines:
        rows.add_column("majority", justify="right")
    for task in tasks:
        for split, scores in results[task.name].items():
            for metric, score in scores.items():
                cells = [task.name, split, metric, metrics.shown(metric, score)]
                if baselines and task.name in baselines:
                    cells.append(metrics.shown(metric, baselines[task.name][split][metric]))
                rows.add_row(*cells)
    average = metrics.pals_average(results)
    if average is not None:
        rows.add_section()
        rows.add_row("average of nine", "", "as in BERT and PALs", f"{average:.1f}")
    return rows
