"""A configuration over the files that the fixture `small` writes: three tasks, a tiny encoder.

Two more tasks, of pairs, are declared for encoder-decoders; see `conftest.of_pairs`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from pals_jax.experiment.config import default


def get_config(directory: str) -> ConfigDict:
    """The argument is the directory of the fixture `small`."""
    root = Path(directory)
    config = default()
    config.encoder = str(root / "encoder")
    config.method = "pals(size=12, heads=3)"
    config.tasks = ("colour", "same", "share")
    config.data.own = ConfigDict(
        {
            "colour": _task(root / "colour.tsv", text=("sentence",), labels=("red", "blue")),
            "same": _task(root / "same.jsonl", text=("a", "b")),
            "share": _task(root / "share.csv", text=("a", "b"), regression=True),
            "upper": _pairs(root / "upper.tsv", text="lower", target="upper"),
            "swap": _pairs(root / "swap.jsonl", text="lower", target="swapped"),
        }
    )
    config.data.max_length = config.data.max_target_length = 16
    config.generation.max_length = 17  # with the start token
    config.data.cache_dir = str(root / "cache")
    config.epochs = 2
    config.steps_per_epoch = 4
    config.checkpoint_every = 3
    config.batch_size = 8
    config.eval_batch_size = 16
    config.optimizer.learning_rate = 3e-3
    return config


def _task(path: Path, **declaration: object) -> dict[str, object]:
    metrics = ("pearson",) if declaration.get("regression") else ("accuracy",)
    files = {"train": str(path), "dev": str(path)}
    return {**files, "label": "label", "metrics": metrics, **declaration}


def _pairs(path: Path, **declaration: object) -> dict[str, object]:
    return {"train": str(path), "dev": str(path), **declaration}
