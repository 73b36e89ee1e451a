"""Four learning rates of Houlsby adapters, trained in one step or one after the other.

    python benchmarks/sweep.py

The bundled tasks, all-MiniLM-L6-v2, 120 steps each, evaluated twice. The times run from the start
to the scores, compilations included. Prints one JSON line: the seconds of both ways, and the
largest difference between their dev scores.
"""

import json
import tempfile
import time
from pathlib import Path

from pals_jax.experiment import config as config_lib
from pals_jax.inference.evaluator import Results
from pals_jax.training.train import train
from pals_jax.training.vmapped_runs import train_together

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.py"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def main() -> None:
    """Trains them both ways."""
    configs = []
    for rate in RATES:
        config = config_lib.load([f"--config={CONFIG}", "--config.trainable=('adapters/',)"])
        config.method = "houlsby(size=16)"
        config.epochs, config.optimizer.learning_rate = 2, rate
        configs.append(config)
    names = [str(rate) for rate in RATES]
    with tempfile.TemporaryDirectory() as here:
        began = time.perf_counter()
        together = train_together(configs, [Path(here, "together", name) for name in names])
        between = time.perf_counter()
        alone: list[Results] = []
        for config, name in zip(configs, names, strict=True):
            alone.append(train(config, Path(here, name)))
        ended = time.perf_counter()
    seconds = {"together": between - began, "one after the other": ended - between}
    apart = max(abs(x - y) for x, y in zip(_scores(together), _scores(alone), strict=True))
    print(json.dumps({"seconds": seconds, "largest_difference": apart}))


def _scores(of_all: list[Results]) -> list[float]:
    return [
        score
        for results in of_all
        for splits in results.values()
        for metrics in splits.values()
        for score in metrics.values()
    ]


if __name__ == "__main__":
    main()
