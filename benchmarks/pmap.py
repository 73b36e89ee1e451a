"""The overhead of `jax.pmap` in a training step, compared with `jit(shard_map)`.

    python benchmarks/pmap.py [--devices=8]

The model is small, so that the wrappers' overhead on the host shows. Both take turns in one
process. Prints one JSON line: the median milliseconds of a step for each, and their ratio.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pals_jax.data.batches import Layout, TrainBatches
from pals_jax.data.packing import Padded
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.optim import make_optimizer
from pals_jax.models.adapters import methods
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.runtime.parallel import AXIS, DataParallel
from pals_jax.training.step import create_state, make_train_step

STEPS, ROUNDS = 20, 15


def main() -> None:
    """Times both on all devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8)
    jax.config.update("jax_num_cpu_devices", parser.parse_args().devices)
    parallel = DataParallel.over()
    model = MultiTaskModel(
        BertConfig(vocab_size=100, hidden_size=32, num_attention_heads=2, intermediate_size=64),
        num_outputs=(2,) * 8,
        method=methods.pals(size=8, heads=2),
    )
    optimizer, _ = make_optimizer(config_lib.default().optimizer, 8, 10_000)
    step = make_train_step(model, optimizer, 0, parallel.division)
    state = parallel.put(
        create_state(init_variables(model, jax.random.key(0)), ["params/", "adapters/"], optimizer)
    )
    shards = parallel.shards
    batches = TrainBatches([_split()], Layout(), Padded(32, 8, shards.total), shards, 0, 8)
    batch = batches(Draw(np.zeros(1, np.int32), _rows()))
    steps = {"pmap": parallel.compile(step), "shard_map": _shard_mapped(step, parallel)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 1):
        for name, compiled in steps.items():
            seconds = _time(compiled, state, batch)
            if round_:  # the first compiles
                times[name].append(1000 * seconds / STEPS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["pmap"] / medians["shard_map"]
    leaves = len(jax.tree.leaves(state))
    print(json.dumps(medians | {"ratio": ratio, "state_leaves": leaves, "unit": "ms"}))


def _shard_mapped(step: Callable[..., Any], parallel: DataParallel) -> Callable[..., Any]:
    def local(state: Any, batch: Any) -> Any:
        return step(state, jax.tree.map(lambda x: x[0], batch))

    mesh = Mesh(np.array(parallel.devices), (AXIS,))
    everywhere, divided = PartitionSpec(), PartitionSpec(AXIS)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(everywhere, divided), out_specs=everywhere, check_vma=False
    )
    return jax.jit(mapped)


def _time(compiled: Callable[..., Any], state: Any, batch: Any) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        state, _ = compiled(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - began


def _split() -> TokenizedSplit:
    ids = np.arange(32 * 8, dtype=np.int32) % 100
    return TokenizedSplit(
        ids, np.arange(33) * 8, np.full(32, 8, np.int32), np.zeros(32, np.float32)
    )


def _rows() -> np.ndarray:
    return np.arange(32).reshape(1, 32)


if __name__ == "__main__":
    main()
