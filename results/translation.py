"""What the claims on translation are tested with: see `results/claims.toml`.

    pals-jax train --config=results/translation.py:DATA --workdir=DIR

DATA is a directory with a Marian that translates from English in `models/opus-mt-en-fr/`, and in
`seq2seq/en_ro/` train.tsv and dev.tsv of the columns `en` and `ro`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(data: str) -> ConfigDict:
    """Software strings to Romanian, on a frozen Marian that writes French."""
    root = Path(data).expanduser()
    config = default()
    config.encoder = str(root / "models" / "opus-mt-en-fr")
    config.method = "shared"
    config.trainable = ("adapters/",)
    config.tasks = ("en_ro",)
    files = {split: str(root / "seq2seq" / "en_ro" / f"{split}.tsv") for split in ("train", "dev")}
    config.data.own = ConfigDict({"en_ro": {**files, "text": "en", "target": "ro"}})
    config.data.max_length = 64
    config.data.max_target_length = 96
    config.label_smoothing = 0.1
    config.generation.num_beams = 1  # on two cores, 4 beams take as long as the training
    config.generation.max_length = 97  # with the start token
    config.checkpoint_every = 100
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.98
    return config
