"""Your own text-classification tasks on one frozen encoder, like the 17 of Houlsby et al. 2019.

    pals-jax train --config=configs/houlsby_extra.py:TASKS --workdir=DIR
    pals-jax train --config=configs/houlsby_extra.py:TASKS --workdir=DIR --sweep

TASKS is a directory with a folder for each task, containing train.tsv, dev.tsv and optionally
test.tsv, with a header and the columns `sentence` and `label`. Tasks are sampled in proportion to
the square roots of their sizes. They do not affect each other, so more can be added later with
--base. The sweep covers the paper's learning rates and sizes, on the dev sets. Published averages
over all seventeen test sets, each with the best run of its sweep: 73.3; full fine-tuning, 73.7.
docs/results.md has the results of a short run on five of them with a small encoder.
"""

from pathlib import Path

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(directory: str) -> ConfigDict:
    """Each folder is one task, named after the folder."""
    config = default()
    config.method = "houlsby(size=64)"
    config.trainable = ("adapters/",)
    config.dtype = "bfloat16"
    folders = sorted(path for path in Path(directory).expanduser().iterdir() if path.is_dir())
    config.data.own = ConfigDict({folder.name: _task(folder) for folder in folders})
    config.tasks = tuple(config.data.own)
    config.sampling = "sqrt"
    config.epochs = 20
    config.steps_per_epoch = 1000
    config.optimizer.learning_rate = 3e-4
    config.sweep = tuple(
        {"method": f"houlsby(size={size})", "optimizer.learning_rate": rate}
        for size in (2, 4, 8, 16, 32, 64)
        for rate in (1e-5, 3e-5, 1e-4, 3e-3)
    )
    return config


def _task(folder: Path) -> dict[str, object]:
    files = {split: folder / f"{split}.tsv" for split in ("train", "dev", "test")}
    present = {split: str(path) for split, path in files.items() if path.exists()}
    return {**present, "text": ("sentence",), "label": "label"}
