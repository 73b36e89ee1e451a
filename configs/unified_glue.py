"""He et al. 2022 on MNLI or SST-2: a frozen RoBERTa-base and a method of the unified view.

    pals-jax train --config=configs/unified_glue.py:sst2 --workdir=DIR
    pals-jax train --config='configs/unified_glue.py:mnli,lora(rank=16)' --workdir=DIR
    pals-jax train --config=configs/unified_glue.py:sst2 --workdir=DIR --sweep

The argument is TASK[,METHOD]; the default is sst2 and the mix-and-match adapter. The sweep has the
paper's five seeds, of which the paper reports the median. Published on the dev sets (MNLI / SST-2):
MAM 87.4 / 94.2, LoRA 87.2 / 94.2, prefix tuning 86.3 / 94.0, full fine-tuning 87.6 / 94.6. Not run
here: it needs an accelerator and the weights. The classifier is trained here; the authors' rule
freezes it.
"""

from ml_collections import ConfigDict

from pals_jax.config import default

SIZES = {"mnli": 392702, "sst2": 67349}  # training examples


def get_config(argument: str = "") -> ConfigDict:
    """Ten epochs of batches of 32."""
    task, _, method = argument.partition(",")
    if (task or "sst2") not in SIZES:
        raise ValueError(f"task {task!r} is not one of {', '.join(SIZES)}")
    config = default()
    config.encoder = "roberta-base"
    config.method = method or "mam(prefix=16, size=16, scale=2)"
    config.trainable = ("adapters/",)
    config.dtype = "bfloat16"
    config.tasks = (task or "sst2",)
    config.data.max_length = 512
    config.epochs = 10
    config.steps_per_epoch = -(-SIZES[config.tasks[0]] // config.batch_size)
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup = 0.06
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    config.sweep = tuple({"seed": seed} for seed in (42, 2, 4, 6, 8))
    return config
