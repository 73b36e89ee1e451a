"""MRPC, RTE, STS-B and CoLA, complete, from all-MiniLM-L6-v2, on a CPU.

    pals-jax train --config='configs/small_glue.py:pals(size=102)' --workdir=DIR \
        --config.data.dir=GLUE --config.seed=0
    pals-jax train --config=configs/small_glue.py:shared --workdir=DIR \
        --config.data.dir=GLUE --config.seed=0

GLUE is a directory with the official files (MRPC/train.tsv and so on). The argument is the method.
docs/results.md has the expected scores.
"""

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(method: str = "pals(size=102)") -> ConfigDict:
    """The paper's recipe, scaled down for a CPU."""
    config = default()
    config.encoder = "all-MiniLM-L6-v2"
    config.method = method or "pals(size=102)"  # 204 at hidden size 768
    config.tasks = ("mrpc", "rte", "stsb", "cola")
    config.data.source = "glue_dir"
    config.data.max_length = 64  # truncates most premises of RTE, but is twice as fast as 128
    config.epochs = 3
    config.steps_per_epoch = 200
    config.optimizer.learning_rate = 1e-4
    return config
