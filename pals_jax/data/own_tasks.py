"""User-defined tasks, declared by a mapping and read from TSV, CSV or JSONL files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pals_jax.data.examples import Examples, check_split, read_examples
from pals_jax.data.readers import Row, read_rows
from pals_jax.data.tasks import Output, Task, to_number
from pals_jax.runtime.errors import UserError

_SPLITS = ("train", "dev", "test")
_LANGUAGES = ("source_language", "target_language")
# The keys that mean something only for some kinds of answers, and those kinds.
_ONLY_FOR: Mapping[str, tuple[Output, ...]] = {
    "label": ("classes", "value"),
    "labels": ("classes",),
    "regression": ("classes", "value"),
    "label_range": ("value",),
    **dict.fromkeys(("target", *_LANGUAGES), ("text",)),
}
_KINDS = {"classes": "classification", "value": "regression", "text": "a task with a target text"}
_DEFAULT_METRICS: Mapping[Output, tuple[str, ...]] = {
    "classes": ("accuracy",),
    "value": ("pearson", "spearman"),
    "text": ("loss", "perplexity"),
}
_KEYS = (*_SPLITS, "text", "metrics", *_ONLY_FOR)


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one task, by split."""

    paths: Mapping[str, Path]

    def splits(self, task: Task) -> tuple[str, ...]:
        """The task's splits that were declared."""
        return tuple(split for split in task.splits if split in self.paths)

    def is_here(self, task: Task) -> bool:
        """See `sources.Source`."""
        del task
        return True

    def read(self, task: Task, split: str) -> Examples:
        """The examples of a split; see `sources.Source`. A test file may have labels or not."""
        check_split(task, split)
        labelled = None if split in task.test_splits else True
        return read_examples(self.paths[split], task, labelled=labelled)


def own_task(name: str, declaration: Mapping[str, Any]) -> tuple[Task, Files]:
    """A task and its source from their declaration.

    Args:
        name: the task's name.
        declaration: these keys:
            train, dev, test: paths of `.tsv`, `.csv` or `.jsonl` files; train is needed.
            text: the name of the text column, or a list of two names.
            target: for encoder-decoders: the name of the column with the text to write.
            source_language, target_language: with a target: the codes of the languages of `text`
                and `target`, where the tokenizer has codes.
            label: without a target: the name of the label column.
            labels: the classes in the order of their ids; by default the sorted labels of train.
            regression: True if the label is a number; default False.
            label_range: regression only: the smallest and the largest label, which become the
                targets 0 and 1; by default those of train.
            metrics: the first is the task's score; by default accuracy, or pearson and spearman,
                or loss and perplexity.

    Raises:
        UserError: if a key is unknown, missing, unused or of a wrong type, or train is unreadable.
    """
    if not isinstance(declaration, Mapping | ConfigDict):
        raise UserError(f"task {name} is declared as {declaration!r}; a mapping is needed.")
    given = {key: declaration[key] for key in declaration if declaration[key] is not None}
    if unknown := sorted(set(given) - set(_KEYS)):
        raise UserError(
            f"task {name} is declared with {', '.join(unknown)}, which is not among the keys"
            f" {', '.join(_KEYS)}."
        )
    answer = "target" if "target" in given else "label"
    if missing := [key for key in ("train", "text", answer) if key not in given]:
        raise UserError(f"the declaration of task {name} lacks {', '.join(missing)}.")
    for key in (*_SPLITS, "label", "target", *_LANGUAGES):
        if not isinstance(given.get(key, ""), str | Path):
            raise UserError(f"task {name} is declared with {key} = {given[key]!r}; give one name.")
    regression = given.get("regression", False)
    if not isinstance(regression, bool):
        raise UserError(f"task {name} is declared with regression = {regression!r}; give a bool.")
    output: Output = "text" if answer == "target" else "value" if regression else "classes"
    if useless := [k for k, kinds in _ONLY_FOR.items() if k in given and output not in kinds]:
        raise UserError(
            f"task {name} is declared with {useless[0]}, of no use in {_KINDS[output]}; remove it."
        )

    files = own_files(declaration)
    text = _names(name, given, "text")
    most = 1 if output == "text" else 2
    if not 1 <= len(text) <= most:
        raise UserError(
            f"task {name} is declared with {len(text)} text columns; give"
            f" {'one' if most == 1 else 'one or two'}."
        )
    metrics = _names(name, given, "metrics") if "metrics" in given else _DEFAULT_METRICS[output]
    task = Task(
        name,
        text,
        label=given.get("label", Task.label),
        labels=_labels(name, given) if output == "classes" else (),
        label_range=_label_range(name, given) if output == "value" else None,
        metrics=metrics,
        eval_splits=("dev",) if "dev" in files.paths else (),
        test_splits=("test",) if "test" in files.paths else (),
        target=given.get("target", ""),
        **{key: given.get(key, "") for key in _LANGUAGES},
    )
    return task, files


def own_files(declaration: Mapping[str, Any]) -> Files:
    """The files of a declaration, without reading them."""
    given = {split: declaration.get(split) for split in _SPLITS}
    return Files({split: Path(path).expanduser() for split, path in given.items() if path})


def _labels(name: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    if "labels" in given:
        labels = _names(name, given, "labels")
    else:
        rows = read_rows(Path(given["train"]).expanduser())
        labels = tuple(sorted({str(row.label(given["label"])) for row in rows}))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(
            f"task {name} needs two or more labels, all different; it has {', '.join(labels)}."
        )
    return labels


def _label_range(name: str, given: Mapping[str, Any]) -> tuple[float, float]:
    if "label_range" in given:
        try:
            low, high = map(to_number, given["label_range"])
        except (TypeError, ValueError) as error:
            raise UserError(f"the label_range of task {name} is not a pair of numbers.") from error
    else:
        rows = read_rows(Path(given["train"]).expanduser())
        numbers = [_number(row, given["label"]) for row in rows]
        low, high = min(numbers), max(numbers)
    if low >= high:
        raise UserError(
            f"the labels of task {name} cannot range from {low:g} to {high:g}; the lowest must be"
            " below the highest."
        )
    return low, high


def _number(row: Row, column: str) -> float:
    try:
        return to_number(row.label(column))
    except ValueError as error:
        raise UserError(f"{row.where}: {error}.") from error


def _names(name: str, given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """One name, or several, of columns, labels or metrics."""
    value = given[key]
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise UserError(f"task {name} is declared with {key} = {value!r}; a list is needed.")
    return tuple(str(entry) for entry in value)
