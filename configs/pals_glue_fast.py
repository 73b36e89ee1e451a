"""BERT and PALs on the eight GLUE tasks, for four chips: as many examples, an eighth of the steps.

    pals-jax train --config=configs/pals_glue_fast.py --workdir=DIR

Ours, not the paper's: batches of eight groups of 32 examples, each group of its own task, so that a
step sees what the paper's sees in eight; bfloat16; the learning rate grows with the square root of
the batch. An optimiser that keeps idle tasks still. Not run here: it needs an accelerator and the
full data sets.
"""

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config() -> ConfigDict:
    """`configs/pals_glue.py` beside it is the paper's."""
    config = default()
    config.method = "pals(size=204)"
    config.dtype = "bfloat16"
    config.groups = 8
    config.batch_size = 256
    config.steps_per_epoch = 300
    config.optimizer.learning_rate = 6e-5
    return config
