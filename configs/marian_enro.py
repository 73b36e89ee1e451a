"""English to Romanian on a frozen English-French Marian, for two CPU cores.

    pals-jax train --config=configs/marian_enro.py:@EN_RO --workdir=DIR
    pals-jax train --config='configs/marian_enro.py:lora(rank=32)@EN_RO' --workdir=DIR \
        --config.encoder=MODEL

The argument is [METHOD]@EN_RO; the default method is the mix-and-match adapter. EN_RO is a
directory with train.tsv, dev.tsv and test.tsv of the columns `en` and `ro`; MODEL is a directory
with the weights of opus-mt-en-fr, which otherwise come from the hub. The decoder has only ever
written French: its words hold all Romanian letters, and Romanian comes out in small pieces.
"""

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(argument: str = "") -> ConfigDict:
    """A thousand steps of 32 pairs, which take about half an hour."""
    method, _, directory = argument.partition("@")
    files = {split: f"{directory or 'en_ro'}/{split}.tsv" for split in ("train", "dev", "test")}
    config = default()
    config.encoder = "Helsinki-NLP/opus-mt-en-fr"
    config.method = method or "mam(prefix=16, size=64, scale=4.0)"
    config.trainable = ("adapters/",)
    config.tasks = ("en_ro",)
    config.data.own = ConfigDict({"en_ro": {**files, "text": "en", "target": "ro"}})
    config.data.max_length = 64
    config.data.max_target_length = 96
    config.epochs, config.steps_per_epoch = 4, 250
    config.label_smoothing = 0.1
    config.generation.max_length = 97  # with the start token
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.98
    return config
