"""Houlsby et al. 2019 on a task of GLUE: a frozen BERT-large with adapters, four chips, batch 32.

    pals-jax train --config=configs/houlsby_glue.py:mrpc,64,3e-4 --workdir=DIR
    pals-jax train --config=configs/houlsby_glue.py:mrpc --workdir=DIR --sweep

The argument is TASK[,SIZE[,LEARNING_RATE[,EPOCHS]]]; mrpc,64,3e-4,20 is the default. The sweep is
the paper's: three learning rates, three sizes, 3 and 20 epochs, five seeds; the best on dev counts.
Published mean scores (table 1, GLUE's test server): 80.0 with sizes from 8 to 256, 79.6 with size
64, and 80.4 with full fine-tuning. Not run here: it needs an accelerator and the weights. The
optimiser corrects its bias, which the authors' code does not.
"""

from ml_collections import ConfigDict

from pals_jax.config import default

# The number of training examples of each task, which sets the steps per epoch.
SIZES = {
    "cola": 8551,
    "sst2": 67349,
    "mrpc": 3668,
    "stsb": 5749,
    "qqp": 363846,
    "mnli": 392702,
    "qnli": 104743,
    "rte": 2490,
}


def get_config(argument: str = "") -> ConfigDict:
    """One task at a time: with a frozen encoder, tasks never touch each other."""
    given = [x for x in argument.split(",") if x]
    task, size, learning_rate, epochs = given + ["mrpc", "64", "3e-4", "20"][len(given) :]
    if task not in SIZES:
        raise ValueError(f"task {task!r} is not one of {', '.join(SIZES)}")
    config = default()
    config.encoder = "bert-large-uncased"
    config.method = f"houlsby(size={int(size)})"
    config.trainable = ("adapters/",)
    config.dtype = "bfloat16"
    config.tasks = (task,)
    config.epochs = int(epochs)
    config.steps_per_epoch = -(-SIZES[task] // config.batch_size)
    config.optimizer.learning_rate = float(learning_rate)
    config.sweep = tuple(
        {
            "method": f"houlsby(size={size})",
            "optimizer.learning_rate": rate,
            "epochs": epochs,
            "seed": seed,
        }
        for size in (8, 64, 256)
        for rate in (3e-5, 3e-4, 3e-3)
        for epochs in (3, 20)
        for seed in range(5)
    )
    return config
