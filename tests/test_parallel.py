"""Any number of devices takes the same step as one device, dropout included."""

from typing import Any

import jax
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from pals_jax.data.batch import Batch
from pals_jax.data.batches import Layout, TrainBatches, eval_batches, sizes
from pals_jax.data.packing import Packed, Padded
from pals_jax.data.sampler import Draw
from pals_jax.experiment.optim import make_optimizer
from pals_jax.inference.steps import make_eval_step
from pals_jax.models.architectures import Model
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.division import Division
from pals_jax.runtime.parallel import DataParallel
from pals_jax.training.step import create_state, make_train_step

pytestmark = pytest.mark.all_devices

LAYOUT = Layout()


def parallel(count: int) -> DataParallel:
    return DataParallel.over(jax.devices()[:count])


def model(rate: float, pairs: bool = False) -> Model:
    """An encoder with PALs or, for pairs, an encoder-decoder with MAM."""
    if pairs:
        rates = dict.fromkeys(("dropout", "attention_dropout"), rate)
        return tiny.seq2seq(tiny.METHODS["mam"], **rates)
    rates = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    # Far more words than a batch reads: then only the gradients of their rows are exchanged.
    config = tiny.config(vocab_size=997, **rates)
    return MultiTaskModel(config, tiny.NUM_OUTPUTS, tiny.METHODS["pals"])


def batches(
    devices: DataParallel, groups: int, size: int, packing: bool, pairs: bool
) -> list[Batch]:
    rng = np.random.default_rng(0)
    splits = [tiny.split(rng, pairs) for _ in tiny.NUM_OUTPUTS]
    draws = [
        Draw(rng.integers(0, 3, groups).astype(np.int32), rng.integers(0, 11, (groups, size)))
        for _ in range(3)
    ]
    shards, count, longest = devices.shards, groups * size, (9, 9) if pairs else 9
    placing: Padded | Packed = Padded(count, longest, shards.total)
    if packing:  # in rows that are the longer, the fewer devices there are
        samples = (sizes(splits, draw) for draw in draws)
        placing = Packed.choose(samples, 1000, count, longest, 12, shards.total)
    layout = Layout(0, 0) if pairs else LAYOUT
    make = TrainBatches(splits, layout, placing, shards, 0, len(splits))
    return [make(draw) for draw in draws]


def trained(
    count: int, groups: int, size: int, rate: float, pairs: bool, packing: bool = True
) -> tuple[Any, list[float]]:
    """The state, with gradients, after one step; the losses of three."""
    it = model(rate, pairs)
    devices = parallel(count).dividing(tiny.shapes(it))
    totals = devices.division.totals
    optimizer, _ = make_optimizer(tiny.optimizer_config(), 3, tiny.TOTAL_STEPS, totals)
    optimizer = tiny.recording(optimizer)
    everything = ("params/", "adapters/")
    state = devices.put(create_state(tiny.variables(it), everything, optimizer))
    step = make_train_step(
        it, optimizer, 0, devices.division, label_smoothing=0.1 if pairs else 0.0
    )
    step = devices.compile(step, donate=True, like=state)
    losses = []
    for number, batch in enumerate(batches(devices, groups, size, packing, pairs)):
        state, scalars = step(state, batch)
        losses.append(float(scalars["loss"]))
        if number == 0:
            first = jax.device_get(devices.to_save(state))
    return first, losses


@pytest.mark.parametrize(
    ("groups", "size", "rate", "counts", "pairs"),
    [
        (3, 2, 0.2, (2,), False),
        pytest.param(3, 2, 0.2, (1,), False, marks=pytest.mark.nightly),
        pytest.param(1, 8, 0.2, (8,), False, marks=pytest.mark.nightly),
        pytest.param(3, 2, 0.2, (2,), True, marks=pytest.mark.slow),
        *(
            pytest.param(*case, 0.0, (1, 2, 4, 8), pairs, marks=pytest.mark.nightly)
            for case in ((1, 8), (8, 1), (3, 2))
            for pairs in (False, True)
        ),
    ],
)
def test_any_number_of_devices_takes_the_same_steps(
    groups: int, size: int, rate: float, counts: tuple[int, ...], pairs: bool
) -> None:
    """One task, fully mixed, and groups that do not divide: the step of one, of padded rows."""
    # Where dropout leaves a row of twelve numbers nearly alike, a layer norm magnifies rounding:
    # the gradients of padded rows, too, then differ by 1.04e-6 between one device and two.
    tolerance = 1e-5 if rate else 1e-6
    expected, losses = trained(1, groups, size, rate, pairs, packing=False)
    for count in counts:
        state, others = trained(count, groups, size, rate, pairs)
        np.testing.assert_allclose(others, losses, rtol=0, atol=1e-6)
        ours, theirs = (ravel_pytree(tree)[0] for tree in (state, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("axes", [{}, {("table",): 0}])
def test_the_sum_of_tables_with_few_rows(axes: dict[tuple[str, ...], int]) -> None:
    """Rows that occur twice count once; of a divided table each device has its part."""
    division = Division("data", axes)
    rows = np.array([[4, 1, 4], [1, 5, 5]])
    tables = np.zeros((2, 6, 3), np.float32)
    for table, own in zip(tables, rows, strict=True):
        table[own] = np.random.default_rng(0).normal(size=(3, 3))

    def total(table: Any, rows: Any) -> Any:
        return division.sum({"table": table}, rows={("table",): rows})["table"]

    found = jax.pmap(total, "data", devices=jax.devices()[:2])(tables, rows)
    expected = tables.sum(axis=0)
    parts = np.split(expected, 2) if axes else [expected, expected]
    np.testing.assert_array_equal(found, parts)


@pytest.mark.parametrize("name", ["adamw", "bert_n_pals"])
def test_a_state_gives_all_its_memory_back(name: str) -> None:
    """No two of its arrays are one, which no step could be given."""
    optimizer, _ = make_optimizer(tiny.optimizer_config(name), 3, tiny.TOTAL_STEPS)
    state = create_state(tiny.variables(model(0.0)), ("params/", "adapters/"), optimizer)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(parallel(1).put(state))]
    assert len(set(places)) == len(places)


def test_every_device_evaluates_its_rows_and_has_all_logits() -> None:
    variables = tiny.variables(model(0.0))
    held_out = tiny.split(np.random.default_rng(1))
    found = {}
    for count in (1, 3, 8):
        devices = parallel(count)
        step = devices.compile(make_eval_step(model(0.0), devices.axis_name))
        placing = Packed.into(2, 18, devices.shards.total)
        found[count] = np.zeros((11, 3))
        for batch, examples in eval_batches(held_out, 1, LAYOUT, placing, devices.shards):
            logits = np.asarray(step((devices.put(variables), None), batch))
            found[count][examples[examples >= 0]] = logits[examples >= 0]
    tiny.assert_rounded_alike(found[3], found[1])
    tiny.assert_rounded_alike(found[8], found[1])


def test_a_divided_state_is_whole_in_checkpoints_and_in_evaluation() -> None:
    """Each device has its part of weights and moments, on any number of devices the same."""
    it = model(0.0)
    optimizer, _ = make_optimizer(tiny.optimizer_config(), 3, tiny.TOTAL_STEPS)
    state = create_state(tiny.variables(it), ("params/", "adapters/"), optimizer)
    for count in (4, 2):
        devices = parallel(count).dividing(state.trainable)
        put = devices.put(state)
        tiny.assert_same(devices.gathered(put.variables), state.variables)
        saved = devices.to_save(put)
        tiny.assert_same(saved, state)
        tiny.assert_same(devices.put(saved), put)
        for path in devices.axes:
            one = saved.trainable
            for key in path:
                one = one[key]
            assert {x.data.size for x in one.addressable_shards} == {one.size // count}
    assert len(devices.axes) == 8  # of each layer's six kernels, the pooler's, and the token types
    assert put.opt_state[1].shared[0].mu["params"]["encoder"]["pooler"]["dense"]["kernel"].ndim == 3


def test_what_is_saved_is_one_copy_and_moves_nothing() -> None:
    devices = parallel(4)
    here = devices.put({"x": np.arange(6.0)})
    saved = devices.to_save(here)
    assert len(here["x"].addressable_shards) == 4
    assert [shard.device for shard in saved["x"].addressable_shards] == jax.devices()[:1]
    first, kept = (tree["x"].addressable_data(0) for tree in (here, saved))
    assert first.unsafe_buffer_pointer() == kept.unsafe_buffer_pointer()
    again = devices.put(saved)
    assert again["x"].sharding == devices.here
