"""What the claims of the papers are tested with: see `results/claims.toml`.

    pals-jax train --config=results/config.py:DATA --config.tasks="('sst2',)" --workdir=DIR

DATA is a directory with GLUE's official files in `glue/`, and in `extra_tasks/` a folder for each
task of your own, as in `configs/houlsby_extra.py`. B2 reads gte-small in `models/gte-small/`. A
bundle (`python -m results bundle`) has all-MiniLM-L6-v2 beside them, in `encoder/`; elsewhere it is
that of its package.
"""

from pathlib import Path

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(data: str) -> ConfigDict:
    """A frozen all-MiniLM-L6-v2; `claims.toml` chooses method, tasks and length."""
    root = Path(data).expanduser()
    config = default()
    bundled = root / "encoder"
    config.encoder = str(bundled) if bundled.is_dir() else "all-MiniLM-L6-v2"
    config.trainable = ("adapters/",)
    config.data.source = "glue_dir"
    config.data.dir = str(root / "glue")
    folders = sorted(path for path in (root / "extra_tasks").iterdir() if path.is_dir())
    config.data.own = ConfigDict({folder.name: _task(folder) for folder in folders})
    config.checkpoint_every = 100
    config.optimizer.learning_rate = 1e-3
    return config


def _task(folder: Path) -> dict[str, object]:
    files = {split: str(folder / f"{split}.tsv") for split in ("train", "dev")}
    return {**files, "text": ("sentence",), "label": "label"}
