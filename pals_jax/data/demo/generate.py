"""Writes the bundled tasks: `python -m pals_jax.data.demo.generate DIRECTORY`.

A pure function of one seed; the files beside this module are its output.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from pals_jax.data.demo import entailment, paraphrase, reviews, similarity
from pals_jax.data.demo.grammar import Draw

SEED = 0
Row = tuple[str, ...]  # one or two sentences, and the label or score


@dataclasses.dataclass(frozen=True)
class _Task:
    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    example: Callable[..., Row | None]  # of a draw, a split, and a label if there are labels
    sizes: tuple[int, int]  # of train and dev


_PAIR = ("sentence1", "sentence2")
_TASKS = (
    _Task("sentiment", ("sentence", "label"), reviews.LABELS, reviews.example, (800, 200)),
    _Task("paraphrase", (*_PAIR, "label"), paraphrase.LABELS, paraphrase.example, (800, 200)),
    _Task("entailment", (*_PAIR, "label"), entailment.LABELS, entailment.example, (1200, 240)),
    _Task("similarity", (*_PAIR, "score"), (), similarity.example, (400, 200)),
)


def generate(seed: int = SEED) -> dict[str, str]:
    """The contents of every file, by name.

    No sentence of a dev set occurs in the train set of its task, and no row occurs twice.
    """
    files: dict[str, str] = {}
    for number, task in enumerate(_TASKS):
        seen: set[str] = set()
        for split, size in zip(("train", "dev"), task.sizes, strict=True):
            draw = Draw(seed, number, split == "dev")
            rows = _rows(task, draw, split, size, frozenset(seen))
            seen.update(text for row in rows for text in row[:-1])
            lines = (task.columns, *draw.several(rows, size))
            files[f"{task.name}_{split}.tsv"] = "".join("\t".join(row) + "\n" for row in lines)
    return files


def _rows(task: _Task, draw: Draw, split: str, size: int, seen: frozenset[str]) -> list[Row]:
    """As many rows as asked for, the labels in equal shares."""
    rows: dict[Row, None] = {}  # a set that keeps its order
    while len(rows) < size:
        label = (task.labels[len(rows) % len(task.labels)],) if task.labels else ()
        row = task.example(draw, split, *label)
        if row is not None and len(set(row)) == len(row) and not seen.intersection(row[:-1]):
            rows[row] = None
    return list(rows)


def main() -> None:
    """Writes the files into a directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in generate().items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
