"""BERT and PALs (Stickland & Murray 2019) on the eight GLUE tasks, as published.

    pals-jax train --config=configs/pals_glue.py --workdir=DIR
    pals-jax train --config='configs/pals_glue.py:pals(size=276,layers="final_half")' --workdir=DIR
    pals-jax train --config=configs/pals_glue.py:shared --workdir=DIR

The argument is the method; pals(size=204) is the default. Published averages of nine test scores
(table 1 of the paper): pals(size=204) 80.4, shared 79.9, separate fine-tuning 79.6.
Not run here: it needs an accelerator and the full data sets.
"""

from ml_collections import ConfigDict

from pals_jax.config import default


def get_config(method: str = "pals(size=204)") -> ConfigDict:
    """The defaults are the paper's; the optimiser is that of its code.

    Computes in bfloat16, as TPUs multiply; `--config.dtype=float32` computes like the paper's GPUs.
    """
    config = default()
    config.method = method or "pals(size=204)"
    config.dtype = "bfloat16"
    config.optimizer.name = "bert_n_pals"
    config.optimizer.schedule = "bert"
    return config
