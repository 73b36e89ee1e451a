"""The cost of dropout in a training step: none, our masks, and JAX's default generator.

    python benchmarks/dropout.py

Six layers of width 384, 32 rows of 64 positions, PALs; the three take turns in one process. Prints
one JSON line: the median seconds of a step for each.
"""

import json
import statistics
import time
from typing import Any
from unittest import mock

import jax
import numpy as np

from pals_jax.data.batch import Batch
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.optim import make_optimizer
from pals_jax.models.adapters import methods
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.models.segments import Places
from pals_jax.training.step import create_state, make_train_step

ROWS, LENGTH, ROUNDS = 32, 64, 7


def main() -> None:
    """Times the three on one device."""
    threefry = mock.patch("pals_jax.models.dropout.mask_bits", _threefry)
    runs = {"off": _compiled(0.0), "masks": _compiled(0.1)}
    with threefry:  # takes effect when the step is traced, in the first call
        runs["threefry"] = _compiled(0.1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (step, state) in runs.items():
            began = time.perf_counter()
            runs[name] = step, jax.block_until_ready(step(state, _batch()))[0]
            times[name].append(time.perf_counter() - began)
    print(json.dumps({name: statistics.median(seconds) for name, seconds in times.items()}))


def _threefry(key: Any, places: Places, shape: tuple[int, ...], columns: Any = None) -> Any:
    """Bits from JAX's own generator instead of our `mask_bits`."""
    del columns
    assert places.salt is not None
    salt = places.salt[0, 0] ^ jax.random.key_data(key)
    return jax.random.bits(jax.random.wrap_key_data(salt), shape, np.uint32)


def _compiled(rate: float) -> tuple[Any, Any]:
    """A training step and its state after the first call, which compiles it."""
    encoder = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        intermediate_size=1536,
        hidden_dropout_prob=rate,
        attention_probs_dropout_prob=rate,
    )
    model = MultiTaskModel(encoder, (2,) * 8, methods.pals(size=102))
    optimizer, _ = make_optimizer(config_lib.default().optimizer, 8, 1000)
    variables = init_variables(model, jax.random.key(0))
    state = create_state(variables, ["params/", "adapters/"], optimizer)
    step = jax.jit(make_train_step(model, optimizer, seed=0), donate_argnums=0)
    return step, step(state, _batch())[0]


def _batch() -> Batch:
    shape = ROWS, LENGTH
    return Batch(
        input_ids=np.random.default_rng(0).integers(1, 30000, shape, dtype=np.int32),
        token_type_ids=np.zeros(shape, np.int32),
        attention_mask=np.ones(shape, np.int32),
        task_ids=np.zeros(1, np.int32),
        slot_tasks=np.zeros(1, np.int32),
        first=np.zeros((ROWS, 1), np.int32),
        example_ids=np.arange(ROWS, dtype=np.int32)[:, None],
        targets=np.zeros((ROWS, 1), np.float32),
        weights=np.ones((ROWS, 1), np.float32),
    )


if __name__ == "__main__":
    main()
