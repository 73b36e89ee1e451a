"""Packing is exact: a step with several examples per row equals the step with one per row."""

from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
import tiny
from flax.traverse_util import flatten_dict

from pals_jax.data.batch import Batch
from pals_jax.data.batches import Layout, TrainBatches, eval_batches
from pals_jax.data.packing import Packed, Padded, Shape
from pals_jax.data.sampler import Draw
from pals_jax.inference.steps import (
    make_eval_step,
    make_every_task_step,
    make_text_loss_step,
)
from pals_jax.models.architectures import Model
from pals_jax.runtime.shards import Shards

EVERY = {"shared": (), **tiny.METHODS, **tiny.TOGETHER}
SEQ2SEQ = {f"{name}, pairs": method for name, method in tiny.SEQ2SEQ_TOGETHER.items()}
SEQ2SEQ |= {"shared, pairs": (), "mam, pairs": tiny.METHODS["mam"]}
METHODS = tiny.mostly_slow(["pals", *tiny.TOGETHER], "pals")
ALONE = ["shared", "mam", "prompt_tuning"]
MIXED, SINGLE = ([2, 0, 2], 3), ([1], 8)
PACKED = Packed((Shape(3, 24), Shape(9, 9)), 3)
PACKED_PAIRS = Packed((Shape(4, 24, 20), Shape(9, 9, 9)), 3)
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
PAIR_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.2)


def model_of(name: str) -> Model:
    """A tiny model with dropout and a method of `EVERY` or, an encoder-decoder, of `SEQ2SEQ`."""
    if name in SEQ2SEQ:
        return tiny.seq2seq(SEQ2SEQ[name], **PAIR_DROPOUT)
    return tiny.model(EVERY[name], **DROPOUT)


def batch(placing: Any, tasks: list[int], size: int, pad_id: int = 0, types: int = 2) -> Batch:
    """A training batch; of pairs, if there are no types of tokens."""
    rng = np.random.default_rng(0)
    splits = [tiny.split(rng, pairs=types == 0) for _ in tiny.NUM_OUTPUTS]
    draw = Draw(np.array(tasks, np.int32), rng.integers(0, 11, (len(tasks), size)))
    make = TrainBatches(splits, Layout(pad_id, types), placing, Shards(), 0, len(splits))
    return jax.tree.map(lambda x: x[0], make(draw))


def assert_same_step(model: Model, padded: Batch, packed: Batch) -> None:
    """Loss and every gradient to 1e-5; tasks that were not drawn keep their rows bit for bit."""
    step, state = tiny.training(model)
    assert packed.attention_mask.max() > 2
    (one, theirs), (other, ours) = (step(state, each) for each in (padded, packed))
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)

    def close(a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, abs(b).max()))

    jax.tree.map(close, other.opt_state[1], one.opt_state[1])
    after, _ = step(other, packed)  # at step 0 the learning rate is 0
    drawn = set(np.asarray(packed.task_ids).tolist())
    before = flatten_dict(state.variables["adapters"], sep="/")
    for path, leaf in flatten_dict(after.variables["adapters"], sep="/").items():
        for task in range(3):
            same = np.array_equal(leaf[task], before[path][task])
            assert same == (task not in drawn), (path, task)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        *(pytest.param(*case.values, MIXED, marks=case.marks) for case in METHODS),
        *(pytest.param(name, MIXED, marks=pytest.mark.nightly) for name in ALONE),
        *(
            pytest.param(name, SINGLE, marks=pytest.mark.nightly)
            for name in ["pals", *ALONE, *tiny.TOGETHER]
        ),
        pytest.param("mam, pairs", MIXED),
        *(
            pytest.param(name, draw, marks=pytest.mark.nightly)
            for name in SEQ2SEQ
            for draw in (MIXED, SINGLE)
            # Without heads, `shared` has nothing to train.
            if name != "shared, pairs" and (name, draw) != ("mam, pairs", MIXED)
        ),
    ],
)
def test_every_method_takes_the_padded_step(name: str, draw: Any) -> None:
    """Of one task and of several, with dropout on: an example has its masks wherever it lies."""
    if name in SEQ2SEQ:
        batches = (batch(p, *draw, types=0) for p in (Padded(9, (9, 9)), PACKED_PAIRS))
    else:
        batches = (batch(placing, *draw) for placing in (Padded(9, 9), PACKED))
    assert_same_step(model_of(name), *batches)


@pytest.mark.slow
@pytest.mark.parametrize("pad_id", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_positions_of_roberta(pad_id: int) -> None:
    """They count from behind the padding's, in each example anew."""
    changes = {"model_type": "roberta", "pad_token_id": pad_id, "type_vocab_size": 1}
    model = tiny.model((), max_position_embeddings=10 + pad_id, **changes)
    padded, packed = (batch(p, *SINGLE, pad_id, types=1) for p in (Padded(8, 9), PACKED))

    def without_pad_id(batch: Batch) -> Batch:
        ids = np.maximum(batch.input_ids, 2)  # no token of a text is padding
        return batch.replace(input_ids=np.where(batch.attention_mask > 0, ids, pad_id))

    assert_same_step(model, without_pad_id(padded), without_pad_id(packed))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_evaluation_of_every_method_is_that_of_padded_rows(name: str) -> None:
    """Logits to 1e-5: of one task, with some layers' adapters alone, mixed, and of every task.

    Mixed batches equal single tasks; one compilation for each shape serves all of them.
    """
    model = tiny.model(EVERY[name], **DROPOUT)
    variables, held_out = tiny.variables(model), tiny.split(np.random.default_rng(0))
    some, all_layers = np.array([True, False, True]), np.ones(3, bool)
    evaluate, every = jax.jit(make_eval_step(model)), jax.jit(make_every_task_step(model))
    found, shapes = [], set()
    for placing in (Padded(4, 9), Packed.into(2, 24)):
        logits = np.full((7, 11, 3), np.nan)
        for shards, places in eval_batches(held_out, 1, Layout(), placing, Shards()):
            there, batch = places >= 0, jax.tree.map(lambda x: x[0], shards)
            rows = np.arange(len(places))
            shapes.add((*batch.input_ids.shape, *places.shape))

            def evaluated(task_ids: Any, active: Any = all_layers, batch: Batch = batch) -> Any:
                ids = np.broadcast_to(task_ids, len(batch.input_ids)).astype(np.int32)
                return np.asarray(evaluate((variables, active), batch.replace(task_ids=ids)))

            single = np.stack([evaluated(task) for task in range(3)])
            tiny.assert_rounded_alike(evaluated(rows % 3)[there], single[rows % 3, rows][there])
            logits[:3, places[there]] = single[:, there]
            logits[3, places[there]] = evaluated(1, some)[there]
            logits[4:, places[there]] = np.asarray(every(variables, batch))[:, there]
        found.append(logits)
    padded, packed = found
    np.testing.assert_allclose(packed, padded, rtol=0, atol=1e-5)
    np.testing.assert_allclose(padded[4:], padded[:3], rtol=0, atol=1e-5)
    assert abs(padded[0] - padded[1])[:, 0].max() > 0.1  # tasks have parameters of their own
    assert evaluate._cache_size() == every._cache_size() == len(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_losses_of_texts_are_those_of_padded_rows(name: str) -> None:
    """And those of NumPy from the logits; one compilation for each shape serves all tasks."""
    model = model_of(name)
    variables, held_out = tiny.variables(model), tiny.split(np.random.default_rng(0), pairs=True)
    step, found, shapes = jax.jit(make_text_loss_step(model)), [], set()
    for placing in (Padded(4, (9, 9)), Packed.into(2, (24, 24))):
        losses = np.full((3, 11), np.nan)
        for shards, places in eval_batches(held_out, 1, Layout(0, 0), placing, Shards()):
            there, batch = places >= 0, jax.tree.map(lambda x: x[0], shards)
            shapes.add(batch.input_ids.shape + batch.target_texts.labels.shape)
            for task in range(3):
                of_rows = np.full(len(places), task, np.int32)
                given = np.asarray(step(variables, batch.replace(task_ids=of_rows)))
                losses[task, places[there]] = given[there]
                assert not given[~there].any()
        found.append(losses)
    padded, packed = found
    np.testing.assert_allclose(packed, padded, rtol=1e-5, atol=1e-5)
    assert abs(padded[0] - padded[1]).max() > 0.1 or not model.method
    assert step._cache_size() == len(shapes)
    texts = held_out.target_texts
    alone = texts.tokens[texts.offsets[4] : texts.offsets[5]][None]
    source = held_out.tokens[held_out.offsets[4] : held_out.offsets[5]][None]
    masks = np.ones_like(source), np.ones_like(alone[:, :-1])
    logits = model.apply(variables, source, masks[0], alone[:, :-1], masks[1], 1)
    chosen = scipy.special.log_softmax(np.asarray(logits, np.float64)[0], axis=-1)
    expected = -chosen[np.arange(len(chosen)), alone[0, 1:]].sum()
    np.testing.assert_allclose(packed[1, 4], expected, rtol=1e-5)
