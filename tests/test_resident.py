"""What the server computes with: the batches it takes from a queue, and a model with room."""

from typing import Any

import jax
import numpy as np
import pytest
import tiny
from conftest import WORDS
from test_written_before import WRITTEN

import pals_jax
from pals_jax import Run
from pals_jax.data.examples import Examples
from pals_jax.data.packing import Packed, Shape
from pals_jax.data.queue_packing import QueuePacking
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.server.batcher import Item
from pals_jax.inference.server.resident import ResidentModel
from pals_jax.models import task_axis


def queue(seconds: Any = lambda shape: 1.0 + shape.rows * shape.length) -> QueuePacking:
    """1, 2, 4 or 8 rows of 16, 24, 32, 48 or 64 positions."""
    packed = Packed.grid(8, 64)
    return QueuePacking(packed, {shape: seconds(shape) for shape in packed.shapes})


# ------------------------------------------------ the next batch of a queue


def test_everything_that_waits_is_computed_once_and_the_oldest_first():
    rng = np.random.default_rng(0)
    tasks, lengths = rng.integers(0, 20, 300), rng.integers(2, 65, 300)
    waiting, packing = np.arange(300), queue()
    while len(waiting):
        chosen, placement = packing.next_batch(tasks[waiting], lengths[waiting])
        assert 0 in chosen
        examples, (rows, length) = waiting[chosen], placement.shape
        seen = np.full((rows, length), -1)
        for example, row, start in zip(examples, placement.row, placement.start, strict=True):
            place = seen[row, start : start + lengths[example]]
            assert len(place) == lengths[example]
            assert (place == -1).all()
            place[:] = tasks[example]
        assert all(len(set(row[row >= 0])) <= 1 for row in seen)
        assert placement.slot.max() < placement.slots
        places = list(zip(placement.row, placement.slot, strict=True))
        assert len(set(places)) == len(places)
        waiting = np.delete(waiting, chosen)


def test_rows_are_as_short_as_the_oldest_allows():
    """They are filled with others of their length; shorter ones take what room is left."""
    tasks, lengths = np.arange(9), np.array([20, 60, 10, 22, 64, 24, 5, 24, 18])
    chosen, placement = queue().next_batch(tasks, lengths)
    assert placement.shape == Shape(4, 24)  # eight rows would take twice as long for little more
    assert chosen.tolist() == [0, 3, 5, 7]
    chosen, placement = queue(lambda shape: 1.0).next_batch(tasks, lengths)
    assert placement.shape == Shape(8, 24)
    assert chosen.tolist() == [0, 3, 5, 7, 8, 2, 6]
    chosen, placement = queue().next_batch(tasks[1:], lengths[1:])
    assert placement.shape == Shape(2, 64)
    assert chosen.tolist() == [0, 3]


def test_texts_of_a_task_share_rows():
    tasks, lengths = np.zeros(6, int), np.array([30, 16, 16, 16, 9, 7])
    chosen, placement = queue().next_batch(tasks, lengths)
    assert placement.shape == Shape(2, 32)
    assert (chosen.tolist(), placement.row.tolist()) == ([0, 1, 2], [0, 1, 1])
    assert (placement.start.tolist(), placement.slot.tolist()) == ([0, 0, 16], [0, 0, 1])


# ------------------------------------------------ a model with room


@pytest.fixture(scope="module")
def upper() -> Run:
    """A run whose adapters begin above the first of two layers."""
    run = pals_jax.load(WRITTEN)
    config = run.experiment.config.copy_and_resolve_references()
    config.method = "pals(size=12, heads=3, layers='final_half')"
    experiment = Experiment(config, run.experiment.tasks, run.experiment.architecture)
    params, method = run.variables["params"], experiment.model().method
    key, outputs = jax.random.key(0), [task.num_outputs for task in experiment.tasks]
    adapters = task_axis.fresh(experiment.architecture, outputs, method, params, key)
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapters)
    return Run.of(experiment, run.tokenizer, {"params": params, "adapters": adapters})


def test_what_lies_below_the_first_adapter_is_computed_once_for_all_tasks(upper, monkeypatch):
    model = ResidentModel.of(upper, max_tasks=5)
    model.warm_up()
    computed: list[int] = []
    below = model.lower
    assert below is not None
    assert below.depth == 1

    def lower(batch: Any) -> Any:
        computed.append(int((batch.example_ids >= 0).sum()))
        return below(batch)

    monkeypatch.setattr(model, "lower", lower)
    rng = np.random.default_rng(0)
    texts = [(" ".join(rng.choice(WORDS, n)), "red box") for n in rng.integers(1, 9, 30)]
    waiting = [Item(text, row) for text in model.encode(texts) for row in (1, 2)]
    logits = dict[int, np.ndarray]()
    left = list(range(len(waiting)))
    while left:
        plan = model.choose([waiting[i] for i in left])
        done = [left[i] for i in plan.chosen]
        logits |= zip(done, model.compute(plan), strict=True)
        left = [i for i in left if i not in done]
    assert sum(computed) == len(texts)
    split = upper.text_encoder(Examples(texts, None))
    tasks = upper.experiment.tasks[1:]
    for row, expected in enumerate(upper.evaluator.answers(upper.variables, tasks, split)):
        mine = np.stack([logits[2 * i + row] for i in range(len(texts))])
        tiny.assert_rounded_alike(mine[:, : expected.shape[1]], expected)


@pytest.mark.slow
@pytest.mark.all_devices
def test_all_devices_give_the_same(upper):
    run = pals_jax.load(WRITTEN)
    run.experiment.config.eval_batch_size = 8
    assert len(run.evaluator.parallel.devices) == 8
    model = ResidentModel.of(run, max_tasks=4)
    model.warm_up()
    model.write(3, model.read(WRITTEN / "same.task").adapters)
    texts = [("red box", "blue cup"), ("a", "the old pen on the hat")] * 5
    items = [Item(text, row) for row in (1, 3) for text in model.encode(texts)]
    plan = model.choose(items)
    split = run.text_encoder(Examples(texts, None))
    (expected,) = run.evaluator.answers(run.variables, [run.task("same")], split)
    for i, logits in zip(plan.chosen, model.compute(plan), strict=True):
        tiny.assert_rounded_alike(logits[:3], expected[i % len(texts)])
