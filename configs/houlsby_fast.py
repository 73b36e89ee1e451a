"""Adapters on a large task of GLUE, for four chips: an epoch has an eighth of the steps.

    pals-jax train --config=configs/houlsby_fast.py:qqp --workdir=DIR

The argument is one of GLUE's four large tasks; mnli is the default. This is not the recipe of
Houlsby et al. 2019, which is in `configs/houlsby_glue.py`: a batch has 256 examples, and the
learning rate is scaled with the square root of the batch size. docs/tpu.md says what larger
batches save. Not run here: it needs an accelerator and the weights.
"""

from ml_collections import ConfigDict

from pals_jax.config import default

# The number of training examples of each task, which sets the steps per epoch.
SIZES = {"sst2": 67349, "qqp": 363846, "mnli": 392702, "qnli": 104743}


def get_config(task: str = "") -> ConfigDict:
    """One task, three epochs, adapters of size 64."""
    task = task or "mnli"
    if task not in SIZES:
        raise ValueError(f"task {task!r} is not one of {', '.join(SIZES)}")
    config = default()
    config.encoder = "bert-large-uncased"
    config.method = "houlsby(size=64)"
    config.trainable = ("adapters/",)
    config.dtype = "bfloat16"
    config.tasks = (task,)
    config.batch_size = 256
    config.epochs = 3
    config.steps_per_epoch = -(-SIZES[task] // config.batch_size)
    config.optimizer.learning_rate = 8.5e-4
    return config
