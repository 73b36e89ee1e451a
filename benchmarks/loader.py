"""The speed of making batches, compared with the fastest training step that consumes them.

    python benchmarks/loader.py --glue=DIR --encoder=DIR

The batches are the GLUE mix, packed, from the memory-mapped cache, built on one thread as in
training. The step trains Houlsby adapters on a frozen encoder, the cheapest step of a configuration
here. The two take turns. Prints one JSON line: for each the median of examples per second, and the
median of their ratio.
"""

import argparse
import json
import statistics
import time

import jax
from glue_mix import Mix
from tqdm import tqdm

from pals_jax.runtime.parallel import DataParallel
from pals_jax.training.step import create_state, train_step_of

ROUNDS, STEPS, BATCHES = 5, 4, 50  # STEPS and BATCHES are per round


def main() -> None:
    """Times them on the default device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", required=True, help="the official GLUE files")
    parser.add_argument("--encoder", required=True, help="a BERT in Hugging Face's format")
    args = parser.parse_args()
    mix = Mix(args.glue, args.encoder, method="houlsby(size=24)", trainable=("adapters/",))
    experiment, make, parallel = mix.experiment, mix.packed(), DataParallel.over()
    optimizer, _ = experiment.optimizer()
    step = parallel.compile(
        train_step_of(experiment, optimizer, parallel.division, seed=0), donate=True
    )
    state = parallel.put(create_state(mix.variables(), experiment.config.trainable, optimizer))
    made = [make(mix.draw(i)) for i in range(ROUNDS * STEPS)]
    for batch in {batch.input_ids.shape: batch for batch in made}.values():
        state, _ = step(state, batch)  # compiles its shape
    rates: dict[str, list[float]] = {"loader": [], "step": []}
    size = experiment.config.batch_size
    for number in tqdm(range(ROUNDS), unit="round"):
        jax.block_until_ready(state)
        began = time.perf_counter()
        for i in range(number * BATCHES, (number + 1) * BATCHES):
            make(mix.draw(i))
        between = time.perf_counter()
        for batch in made[number * STEPS : (number + 1) * STEPS]:
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        rates["loader"].append(BATCHES * size / (between - began))
        rates["step"].append(STEPS * size / (time.perf_counter() - between))
    ratios = [a / b for a, b in zip(rates["loader"], rates["step"], strict=True)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(json.dumps({"examples_per_second": medians, "ratio": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
