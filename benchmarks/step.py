"""The cost of a training step for several methods, mixed tasks, many tasks and frozen encoders.

    python benchmarks/step.py

Six layers of width 384, 8 packed rows of 128 positions (about 28 sentences of GLUE), float32, with
dropout. All take turns in one process. Prints one JSON line: for each, the median seconds of a step
and the median over rounds of the ratio to `pals`.
"""

import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pals_jax.data.batch import Batch
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.optim import make_optimizer
from pals_jax.models.adapters import methods
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.training.step import create_state, make_train_step

ROWS, LENGTH, SLOTS, ROUNDS = 8, 128, 16, 9
EVERYTHING, ADAPTERS = ("params/", "adapters/"), ("adapters/",)
ENCODER = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
PALS, HALF = methods.pals(size=108), methods.pals(size=108, layers="final_half")
# Method, what is trained, T, tasks per batch, whether hidden states of the lower layers are cached.
STEPS: dict[str, tuple[Any, tuple[str, ...], int, int, bool]] = {
    "pals": (PALS, EVERYTHING, 8, 1, False),
    "shared": ((), EVERYTHING, 8, 1, False),
    "pals, 8 tasks in the batch": (PALS, EVERYTHING, 8, 8, False),
    "pals, 64 tasks": (PALS, EVERYTHING, 64, 1, False),
    "pals, 512 tasks": (PALS, EVERYTHING, 512, 1, False),
    "pals, encoder frozen": (PALS, ADAPTERS, 8, 1, False),
    "pals in the final half, encoder frozen": (HALF, ADAPTERS, 8, 1, False),
    "pals in the final half, encoder frozen, lower layers kept": (HALF, ADAPTERS, 8, 1, True),
}


def main() -> None:
    """Times them on the default device."""
    runs = {name: _compiled(*what) for name, what in STEPS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(ROUNDS), unit="round"):
        for name, (step, state, batch) in runs.items():
            began = time.perf_counter()
            after, _ = jax.block_until_ready(step(state, batch))
            seconds[name].append(time.perf_counter() - began)
            runs[name] = step, after, batch
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds["pals"], strict=True))
        for name, times in seconds.items()
    }
    print(json.dumps({"seconds": medians, "to_pals": ratios}))


def _compiled(
    method: Any, rules: tuple[str, ...], tasks: int, groups: int, kept: bool
) -> tuple[Any, ...]:
    """A training step, its state after the first call, which compiles it, and its batch."""
    model = MultiTaskModel(ENCODER, (2,) * tasks, method)
    optimizer, _ = make_optimizer(config_lib.default().optimizer, tasks, 1000)
    state = create_state(init_variables(model, jax.random.key(0)), rules, optimizer)
    rng, numbers = np.random.default_rng(0), np.arange(ROWS * SLOTS, dtype=np.int32)
    segments = np.sort(rng.integers(1, 5, (ROWS, LENGTH)).astype(np.int32), axis=1)
    hidden = rng.normal(size=(ROWS, LENGTH, ENCODER.hidden_size)).astype(np.float32)
    batch = Batch(
        input_ids=rng.integers(1, 30000, (ROWS, LENGTH), dtype=np.int32),
        token_type_ids=np.zeros((ROWS, LENGTH), np.int32),
        attention_mask=segments,
        first=np.zeros((ROWS, SLOTS), np.int32),
        example_ids=numbers.reshape(ROWS, SLOTS),
        targets=np.zeros((ROWS, SLOTS), np.float32),
        weights=np.ones((ROWS, SLOTS), np.float32),
        task_ids=np.arange(groups, dtype=np.int32),
        # As `TrainBatches` sets it.
        slot_tasks=np.arange(groups, dtype=np.int32) if groups < tasks else None,
        hidden=hidden if kept else None,
    )
    step = jax.jit(make_train_step(model, optimizer, seed=0), donate_argnums=0)
    return step, step(state, batch)[0], batch


if __name__ == "__main__":
    main()
