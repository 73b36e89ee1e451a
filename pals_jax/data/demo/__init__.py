"""Four small tasks that come with the package: see the README.md of this folder.

`TASKS` declares them in the same way as a configuration declares user-defined tasks.
"""

from importlib import resources
from pathlib import Path
from typing import Any


def path(name: str) -> Path:
    """Where a bundled file is, for example "sentiment_train.tsv"."""
    return Path(str(resources.files(__name__) / name))


def _files(name: str) -> dict[str, str]:
    return {split: str(path(f"{name}_{split}.tsv")) for split in ("train", "dev")}


_PAIR = ("sentence1", "sentence2")
TASKS: dict[str, dict[str, Any]] = {
    "sentiment": {
        **_files("sentiment"),
        "text": ("sentence",),
        "label": "label",
        "labels": ("negative", "positive"),
    },
    "paraphrase": {
        **_files("paraphrase"),
        "text": _PAIR,
        "label": "label",
        "labels": ("different", "same"),
        "metrics": ("accuracy", "f1"),
    },
    "entailment": {
        **_files("entailment"),
        "text": _PAIR,
        "label": "label",
        "labels": ("entailment", "neutral", "contradiction"),
    },
    "similarity": {
        **_files("similarity"),
        "text": _PAIR,
        "label": "score",
        "regression": True,
        "label_range": (0.0, 5.0),
        "metrics": ("pearson", "spearman"),
    },
}
