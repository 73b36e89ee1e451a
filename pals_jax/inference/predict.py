"""Predictions of a run, for texts or for the test sets of GLUE's server."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from pals_jax.data.examples import Examples
from pals_jax.data.tasks import GLUE, Task
from pals_jax.inference import submission
from pals_jax.inference.evaluator import decide
from pals_jax.inference.texts import Example, Fitted, fit
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas

    from pals_jax.inference.run import Run


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer of one task for one example.

    Attributes:
        texts: the example, by the names of the task's text columns.
        task: the task's name.
        label: the most probable class; None for other answers than classes.
        probabilities: of each class; empty for other answers.
        value: the predicted number; None for other answers than values.
        text: the generated text; None for other answers than texts.
    """

    texts: dict[str, str]
    task: str
    label: str | None
    probabilities: dict[str, float]
    value: float | None
    text: str | None = None

    def columns(self) -> dict[str, Any]:
        """The answer by the names of a table's columns.

        They are "label" and "p(LABEL)", or "value", or "prediction" of a text.
        """
        if self.text is not None:
            return {"prediction": self.text}
        if self.label is None:
            return {"value": self.value}
        return {"label": self.label} | {f"p({k})": p for k, p in self.probabilities.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions(Sequence[Prediction]):
    """Predictions in the order of the examples; those of several tasks for an example are together.

    Attributes:
        rows: the predictions.
        tasks: the names of the tasks.
        index: the index of the data frame that the examples came from, if they did.
    """

    rows: tuple[Prediction, ...]
    tasks: tuple[str, ...]
    index: Any = dataclasses.field(default=None, repr=False)

    def to_pandas(self) -> "pandas.DataFrame":
        """A data frame with one row for each prediction: texts, "task" and `Prediction.columns`.

        Raises:
            UserError: if pandas is not installed.
        """
        try:
            import pandas  # optional, and slow to import
        except ImportError as error:
            raise UserError("to_pandas needs pandas, which is not here: pip install it.") from error
        rows = [{**row.texts, "task": row.task, **row.columns()} for row in self.rows]
        index = None if self.index is None else np.repeat(self.index, len(self.tasks))
        return pandas.DataFrame(rows, index=index)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prediction, ...]: ...
    def __getitem__(self, index: int | slice) -> Prediction | tuple[Prediction, ...]:
        """One prediction, or several."""
        return self.rows[index]

    def __len__(self) -> int:
        """The number of examples times the number of tasks."""
        return len(self.rows)


def predict(
    run: "Run", tasks: Sequence[Task], examples: Sequence[Example], index: Any = None
) -> Predictions:
    """The predictions of those of the tasks that the examples fit.

    Args:
        run: the run.
        tasks: tasks of the run.
        examples: see `pals_jax.inference.texts`.
        index: see `Predictions`.

    Raises:
        UserError: if the examples do not fit, or a task came without a head.
    """
    fitted, rows = stream(run, tasks, examples)
    return Predictions(tuple(rows), tuple(task.name for task in fitted.tasks), index)


def stream(
    run: "Run", tasks: Sequence[Task], examples: Sequence[Example]
) -> tuple[Fitted, Iterator[Prediction]]:
    """As `predict`: the examples with their tasks, and the predictions as they are made."""
    if headless := [task.name for task in tasks if not task.has_head]:
        raise UserError(
            f"task {headless[0]} came without a head, so it has no labels to predict; encode gives"
            " vectors of texts."
        )
    fitted = fit(tasks, examples)
    if tasks[0].output == "text":
        return fitted, _generated(run, fitted)
    split = run.text_encoder(Examples(fitted.texts, None))
    answers = run.evaluator.answers(run.variables, fitted.tasks, split)
    return fitted, rows_of(fitted, answers)


def _generated(run: "Run", fitted: Fitted) -> Iterator[Prediction]:
    written = run.text_generator(run.variables, fitted.tasks, fitted.texts)
    for texts, row in zip(fitted.texts, written, strict=True):
        columns = dict(zip(fitted.columns, texts, strict=True))
        for task, text in zip(fitted.tasks, row, strict=True):
            yield Prediction(columns, task.name, None, {}, None, text)


def rows_of(fitted: Fitted, answers: Sequence[np.ndarray]) -> Iterator[Prediction]:
    """The predictions that logits mean.

    Args:
        fitted: N examples and their tasks.
        answers: each task's logits, float32 [N, C_task].
    """
    decisions = [decide(task, x).tolist() for task, x in zip(fitted.tasks, answers, strict=True)]
    shares = [_softmax(x).tolist() for x in answers]
    for i, texts in enumerate(fitted.texts):
        columns = dict(zip(fitted.columns, texts, strict=True))
        for task, decision, share in zip(fitted.tasks, decisions, shares, strict=True):
            answer: Any = task.target_to_label(decision[i])
            if task.is_regression:
                yield Prediction(columns, task.name, None, {}, answer)
            else:
                probabilities = dict(zip(task.labels, share[i], strict=True))
                yield Prediction(columns, task.name, answer, probabilities, None)


def _softmax(logits: np.ndarray) -> np.ndarray:
    # SciPy's takes a quarter of a second to import.
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def write(rows: Iterable[Prediction], tasks: int, as_json: bool, out: Any) -> None:
    """Writes one line for each example, of JSON or, below a header, of TSV, as the rows come.

    Its keys are the text columns, "prediction" and "p(LABEL)", the last two with the task's name
    before them if there are several tasks.
    """
    for number, answers in enumerate(_batched(rows, tasks)):
        record: dict[str, Any] = dict(answers[0].texts)
        for row in answers:
            before = f"{row.task}: " if tasks > 1 else ""
            (_, prediction), *others = row.columns().items()
            record[f"{before}prediction"] = prediction
            record |= {f"{before}{name}": value for name, value in others}
        if as_json:
            print(json.dumps(record), file=out, flush=True)
            continue
        if number == 0:
            print("\t".join(record), file=out)
        cells = (f"{x:.4f}" if isinstance(x, float) else x for x in record.values())
        # Texts from CSV or JSON may contain tabs and line ends, which would break the TSV.
        print("\t".join(" ".join(cell.split()) for cell in cells), file=out, flush=True)


def _batched(rows: Iterable[Prediction], size: int) -> Iterator[tuple[Prediction, ...]]:
    rest = iter(rows)
    return iter(lambda: tuple(itertools.islice(rest, size)), ())


def write_submission(run: "Run", directory: Path, fill_missing: bool) -> Path:
    """Predicts every GLUE test set that the run has a task for, and writes the server's files.

    Returns:
        The path of the zip file.

    Raises:
        UserError: if the submission would be incomplete, or test data are missing.
    """
    predictions = {}
    for task in (*run.experiment.tasks, *_diagnostics(run)):
        if task.name not in GLUE:
            continue
        for split in task.test_splits:
            examples = run.experiment.source(task).read(task, split)
            head, tokens = run.task(task.head or task.name), run.text_encoder(examples)
            decisions = decide(task, run.evaluator.logits(run.variables, head, tokens))
            labels = [task.target_to_label(decision) for decision in decisions]
            predictions[task.name, split] = submission.Predictions(examples.ids, labels)
    path = submission.write(predictions, directory, fill_missing=fill_missing)
    for name, answer in submission.defaults(predictions).items():
        say(f"{name} has no predictions of this run; all its rows have the constant {answer}")
    return path


def _diagnostics(run: "Run") -> Iterator[Task]:
    """The diagnostic sets (no training data of their own) that a head of the run can answer."""
    names = {task.name for task in run.experiment.tasks}
    return (task for task in GLUE.values() if task.head in names)
