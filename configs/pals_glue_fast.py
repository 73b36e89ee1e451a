"""BERT and PALs on the eight GLUE tasks, for four chips: as many examples in 1/8 of the steps.

    pals-jax train --config=configs/pals_glue_fast.py --workdir=DIR

This is not the paper's recipe: a batch has eight groups of 32 examples, each group from one task,
so that one step covers as many examples as eight of the paper's. It uses bfloat16, scales the
learning rate with the square root of the batch size, and leaves tasks that are not drawn unchanged.
Not run here: it needs an accelerator and the full data sets.
"""

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config() -> ConfigDict:
    """`configs/pals_glue.py` has the paper's recipe."""
    config = default()
    config.method = "pals(size=204)"
    config.dtype = "bfloat16"
    config.groups = 8
    config.batch_size = 256
    config.steps_per_epoch = 300
    config.optimizer.learning_rate = 6e-5
    return config
