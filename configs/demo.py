"""PALs on the bundled tasks, from all-MiniLM-L6-v2: the first thing to run.

pals-jax train --config=configs/demo.py --workdir=runs/demo

"""

from ml_collections import ConfigDict

from pals_jax.config import default
from pals_jax.data import demo


def get_config() -> ConfigDict:
    """Four tasks with the formats of GLUE's."""
    config = default()
    config.encoder = "all-MiniLM-L6-v2"
    config.method = "pals(size=102)"  # 204 at hidden size 768
    config.data.own = ConfigDict(demo.TASKS)
    config.tasks = tuple(demo.TASKS)
    config.data.max_length = 48
    config.epochs = 4
    config.steps_per_epoch = 60
    config.optimizer.learning_rate = 1e-4
    return config
