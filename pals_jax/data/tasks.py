"""The definition of a task, the tasks of GLUE (Wang et al. 2019), and XSum and WMT16."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from pals_jax.runtime.errors import UserError

Output: TypeAlias = Literal["classes", "value", "text"]  # what the answers of a task are


@dataclasses.dataclass(frozen=True)
class Task:
    """A task whose answers are classes, values (regression) or texts, wherever its data come from.

    Attributes:
        name: for example "mrpc".
        text: the names of its one or two text columns; empty if a checkpoint of another code does
            not tell: it then takes one text or two.
        label: the name of its label column.
        labels: the class names in the order of their ids; empty unless the answers are classes.
        label_range: regression only: the labels that become the targets 0 and 1. None: the model's
            output is the label, as in checkpoints of other codes.
        metrics: names of metrics; the first is the task's score.
        eval_splits: the labelled splits on which it is evaluated.
        test_splits: the splits to predict; their labels are usually secret.
        head: for a diagnostic set without training data, the task whose head answers it.
        has_head: False for adapters that came without a head: they give vectors and no labels.
        target: the name of the column with the text to write; empty: the answers are no texts.
        source_language: the tokenizer's code of the text's language; empty: it needs none.
        target_language: that of the target's language.
    """

    name: str
    text: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    metrics: tuple[str, ...] = ()
    eval_splits: tuple[str, ...] = ("dev",)
    test_splits: tuple[str, ...] = ("test",)
    head: str | None = None
    has_head: bool = True
    target: str = ""
    source_language: str = ""
    target_language: str = ""

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Task":
        """The inverse of `dataclasses.asdict` and JSON, which turns tuples into lists."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
        }
        return cls(**fields)

    def check(self) -> None:
        """Checks the kinds of the fields, which may come from a file.

        Raises:
            TypeError: if a field is of another kind, or there are too many text columns.
        """
        lists = self.text, self.labels, self.metrics
        if not all(isinstance(x, tuple) for x in lists) or not isinstance(self.has_head, bool):
            raise TypeError("a list of the task is not a list, or has_head is not true or false")
        words = (self.name, self.label, *self.text, *self.labels, *self.metrics)
        words += (self.target, self.source_language, self.target_language)
        if not self.name or not all(isinstance(word, str) for word in words):
            raise TypeError("a name, column, label or metric of the task is not a text")
        if len(self.text) > 2 or len(set(self.labels)) < len(self.labels):
            raise TypeError("the task has more than two text columns, or repeats a label")
        if self.target and (self.labels or len(self.text) != 1):
            raise TypeError("the task has a target text, and labels or other than one source text")
        if self.label_range is not None:
            low, high = map(to_number, self.label_range)
            if self.output != "value" or low >= high:
                raise TypeError("the task has a label_range that does not fit it")

    @property
    def output(self) -> Output:
        """What its answers are."""
        if self.target:
            return "text"
        return "classes" if self.labels else "value"

    @property
    def is_regression(self) -> bool:
        """Whether the answers are values."""
        return self.output == "value"

    @property
    def num_outputs(self) -> int:
        """The width of its head: the number of classes, 1 for values, 0 for texts."""
        return {"classes": len(self.labels), "value": 1, "text": 0}[self.output]

    def columns(self, count: int) -> tuple[str, ...]:
        """The names of `count` texts; empty if it takes another number of texts."""
        names = self.text or _UNNAMED[:count]
        return names if len(names) == count else ()

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits it may have, "train" first."""
        train = ("train",) if self.head is None else ()
        return (*train, *self.eval_splits, *self.test_splits)

    def label_to_target(self, label: str | float) -> float:
        """The training target: a class id, or the label rescaled to [0, 1].

        STS-B labels, 0 to 5, are thus divided by 5 as in the code of Stickland & Murray (2019).
        Numbers are first rounded to float32, the precision of some sources, so that all sources
        yield the same target.

        Raises:
            ValueError: if the label is not in the list, or not a finite number.
        """
        if not self.is_regression:
            if str(label) not in self.labels:
                raise ValueError(f"label {str(label)!r} is not one of {', '.join(self.labels)}")
            return float(self.labels.index(str(label)))
        if self.label_range is None:
            raise TypeError(f"the regression task {self.name} was declared without a label_range")
        low, high = self.label_range
        return (float(np.float32(to_number(label))) - low) / (high - low)

    def target_to_label(self, target: float) -> str | float:
        """The label of a class id, or of a regression output after clipping to [0, 1]."""
        if not self.is_regression:
            return self.labels[int(target)]
        if self.label_range is None:
            return float(target)
        low, high = self.label_range
        return low + min(max(float(target), 0.0), 1.0) * (high - low)


def to_number(label: str | float) -> float:
    """A regression label as a number.

    Raises:
        ValueError: if it is not a finite number.
    """
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"label {label!r} is not a finite number")
    return number


_UNNAMED = ("text", "text_pair")  # as transformers calls them
_SENTENCES = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_NLI = ("entailment", "neutral", "contradiction")

# Columns and class ids follow TFDS, class names follow the submission server.
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), labels=_BINARY, metrics=("matthews",)),
        Task("sst2", ("sentence",), labels=_BINARY, metrics=("accuracy",)),
        Task("mrpc", _SENTENCES, labels=_BINARY, metrics=("f1", "accuracy")),
        Task("stsb", _SENTENCES, label_range=(0.0, 5.0), metrics=("pearson", "spearman")),
        Task("qqp", ("question1", "question2"), labels=_BINARY, metrics=("f1", "accuracy")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            labels=_NLI,
            metrics=("accuracy",),
            eval_splits=("dev_matched", "dev_mismatched"),
            test_splits=("test_matched", "test_mismatched"),
        ),
        Task(
            "qnli",
            ("question", "sentence"),
            labels=("entailment", "not_entailment"),
            metrics=("accuracy",),
        ),
        Task("rte", _SENTENCES, labels=("entailment", "not_entailment"), metrics=("accuracy",)),
        Task("wnli", _SENTENCES, labels=_BINARY, metrics=("accuracy",)),
        Task(
            "ax",
            ("premise", "hypothesis"),
            labels=_NLI,
            metrics=("matthews",),
            eval_splits=(),
            head="mnli",
        ),
    )
}

# The tasks of encoder-decoders in He et al. (2022). The language codes are mBART's.
TEXT_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("xsum", ("document",), target="summary", metrics=("loss", "perplexity")),
        Task(
            "wmt16_enro",
            ("en",),
            target="ro",
            source_language="en_XX",
            target_language="ro_RO",
            metrics=("loss", "perplexity"),
        ),
    )
}

KNOWN: dict[str, Task] = GLUE | TEXT_TASKS


def known_task(name: str) -> Task:
    """The task of that name, of GLUE or one of `TEXT_TASKS`.

    Raises:
        UserError: if there is none.
    """
    if name in KNOWN:
        return KNOWN[name]
    near = difflib.get_close_matches(name.lower().replace("-", ""), KNOWN)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(KNOWN)}."
    raise UserError(f"there is no task {name!r}{hint}")
