"""The model of encoder-decoders: masks, dropout, tasks, and the places of methods.

Its parity with PyTorch: `test_bart` and `test_unified_view_seq2seq`.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pals_jax.models import counts, merge, task_axis
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck
from pals_jax.models.adapters.parse import parse_method
from pals_jax.models.adapters.places import places, within
from pals_jax.models.adapters.serialize import dumps
from pals_jax.models.adapters.spec import Adapter
from pals_jax.models.bart import BartConfig
from pals_jax.models.multitask import init_variables
from pals_jax.models.segments import Packing
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.shapes import adapter_shapes, variable_shapes
from pals_jax.models.stack import layers_below
from pals_jax.runtime.errors import UserError

ARRAYS = tuple(tiny.texts().values())
SOURCES = ARRAYS[:2]
MODEL_TYPES = ("bart", "mbart", "marian")


# The model


@cache
def compiled(model: Seq2SeqModel) -> Any:
    return jax.jit(model.apply)


def test_too_long_texts_are_refused() -> None:
    model = tiny.seq2seq()
    variables, long, short = tiny.variables(model), np.ones((1, 10), int), np.ones((1, 3), int)
    with pytest.raises(UserError, match="a source of 10 tokens is above the model's 9 positions"):
        model.apply(variables, long, long, short, short, 0)
    with pytest.raises(UserError, match="a target of 10 tokens is above the model's 9 positions"):
        model.apply(variables, short, short, long, long, 0)
    with pytest.raises(UserError, match="task id 3 is out of range; the 3 tasks are 0 to 2"):
        model.apply(variables, short, short, short, short, 3)


def test_targets_are_causal_and_padding_is_not_seen() -> None:
    model = tiny.seq2seq(methods.pals(6, 3))
    variables, apply = tiny.variables(model), compiled(model)
    ids, mask, targets, target_mask = ARRAYS
    logits = apply(variables, *ARRAYS, 1)
    later = targets.copy()
    later[:, 3:] = (later[:, 3:] + 7) % 31
    changed = apply(variables, ids, mask, later, target_mask, 1)
    np.testing.assert_array_equal(logits[:, :3], changed[:, :3])
    assert not np.allclose(logits[:, 3:], changed[:, 3:], atol=1e-2)
    noise = np.where(mask > 0, ids, (ids + 7) % 31)
    np.testing.assert_array_equal(logits, apply(variables, noise, mask, targets, target_mask, 1))
    other = apply(variables, (ids + 1) % 31, mask, targets, target_mask, 1)
    assert not np.allclose(logits, other, atol=1e-2)


def dropout_keys(*seeds: int) -> list[Any]:
    return [{"dropout": jax.random.key(seed)} for seed in seeds]


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_on_exactly_where_a_key_is_passed(rate: str) -> None:
    model = tiny.seq2seq(**{rate: 0.5})
    variables, apply = tiny.variables(model), compiled(model)
    one, again, other = (apply(variables, *ARRAYS, 0, rngs=key) for key in dropout_keys(1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-2)
    off = apply(variables, *ARRAYS, 0)
    np.testing.assert_array_equal(off, compiled(tiny.seq2seq())(variables, *ARRAYS, 0))
    assert not np.allclose(one, off, atol=1e-2)


@pytest.mark.slow
def test_the_two_stacks_have_dropout_masks_of_their_own() -> None:
    """Seen at the embeddings: both stacks have the same words and positions, and nothing else."""
    probe = tiny.Probe()
    at_queries = Adapter("probe", "attention.query", probe, attention=("self",))
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 20}
    model = tiny.seq2seq((at_queries,), model_type="marian", dropout=0.5, **sizes)
    variables = jax.tree.map(jnp.zeros_like, tiny.variables(model))
    variables["params"]["vocabulary"]["embedding"] += 1.0
    ids = SOURCES[0][:, :5]
    texts = ids, np.ones_like(ids), ids, np.ones_like(ids)
    model.apply(variables, *texts, 0, rngs=dropout_keys(0)[0])
    jax.effects_barrier()
    masks = {(np.asarray(x) == 0).tobytes() for x, _ in probe.seen}
    assert len(masks) == 2 * len(ids)  # each row has its own


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_pairs_equal_pairs_alone(model_type: str) -> None:
    """Two pairs in a row of sources and a row of targets; dropout on, in other places of the row.

    With a method of every kind that sees several positions.
    """
    method = methods.pals(6, 3) + methods.mam(3, 4) + methods.prompt_tuning(2)
    model = tiny.seq2seq(method, model_type=model_type, dropout=0.2, attention_dropout=0.2)
    variables, apply = tiny.variables(model), compiled(model)
    packed = {name: np.zeros((1, 9), int) for name in tiny.texts()}
    alone = {name: np.zeros((2, 7), int) for name in tiny.texts()}
    # The two examples' places in the row of sources, and in the row of targets.
    places_of = {"": (slice(1, 4), slice(4, 6)), "decoder_": (slice(0, 4), slice(4, 7))}
    for side, slices in places_of.items():
        for i, place in enumerate(slices):
            length = place.stop - place.start
            tokens = tiny.texts()[f"{side}input_ids"][i, :length]
            packed[f"{side}input_ids"][0, place] = alone[f"{side}input_ids"][i, :length] = tokens
            packed[f"{side}attention_mask"][0, place] = i + 1
            alone[f"{side}attention_mask"][i, :length] = 1
    source_first, target_first = (
        np.array([[place.start for place in slices]]) for slices in places_of.values()
    )
    packing = Packing(source_first, np.array([[0, 1]]))
    for options in ({}, {"rngs": dropout_keys(3)[0]}):
        expected = apply(variables, **alone, task_ids=1, **options)
        rows = {"packing": packing, "decoder_first": target_first}
        actual = apply(variables, **packed, task_ids=1, **rows, **options)
        for i, place in enumerate(places_of["decoder_"]):
            tiny.assert_rounded_alike(actual[0, place], expected[i, : place.stop - place.start])


def loss(model: Seq2SeqModel, variables: Any, task: Any) -> Any:
    return jnp.sum(jax.nn.log_softmax(model.apply(variables, *ARRAYS, task))[..., 3])


@pytest.mark.slow
def test_remat_gives_the_same_gradients() -> None:
    model = tiny.seq2seq(methods.mam(3, 4))
    variables = tiny.variables(model)
    plain, remat = (
        jax.jit(jax.grad(lambda v, m=m: loss(m, v, 0)))(variables)
        for m in (model, model.clone(remat=True))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_on_float32_parameters() -> None:
    half = tiny.seq2seq(methods.mam(3, 4)).clone(dtype=jnp.bfloat16)
    variables = tiny.variables(half)
    encode = jax.eval_shape(lambda v: half.apply(v, *SOURCES, 0, method="encode"), variables)
    decode = jax.eval_shape(lambda v: half.apply(v, *ARRAYS, 0, method="decode"), variables)
    assert (encode.dtype, encode.shape) == (jnp.bfloat16, (4, 7, 12))
    assert (decode.dtype, decode.shape) == (jnp.bfloat16, (4, 5, 12))
    gradients = jax.eval_shape(jax.grad(lambda v: loss(half, v, 0)), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
    full = compiled(half.clone(dtype=jnp.float32))(variables, *ARRAYS, 0)
    logits = compiled(half)(variables, *ARRAYS, 0)
    assert logits.dtype == np.float32
    assert np.abs(logits - full).mean() < 0.05 < np.asarray(full).std()


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth() -> None:
    def size(depth: int) -> int:
        model = tiny.seq2seq(methods.mam(3, 4), encoder_layers=depth, decoder_layers=depth)
        shapes = variable_shapes(model)
        gradients = jax.jit(jax.grad(lambda v: loss(model, v, 0)))
        return gradients.lower(shapes).as_text().count("\n")

    assert size(4) == size(12) > 100


@pytest.mark.slow
def test_the_encoder_below_the_first_adapter_can_be_skipped() -> None:
    """Its hidden states, as a cache holds them, give the same as the tokens."""
    upper = Adapter("upper", "ffn.output", Bottleneck(4), layers=(-1,))
    model = tiny.seq2seq((upper,), encoder_layers=3)
    variables = tiny.variables(model)
    assert layers_below(adapter_shapes(model)) == 2
    below = tiny.seq2seq(encoder_layers=2)
    params = dict(variables["params"])
    params["encoder"] = dict(params["encoder"])
    params["encoder"]["layers"] = jax.tree.map(lambda x: x[:2], params["encoder"]["layers"])
    own = {"params": params, "adapters": {}}
    hidden = jax.jit(lambda v: below.apply(v, *SOURCES, 0, method="encode"))(own)
    skipped = compiled(model)(variables, *ARRAYS, 1, hidden=hidden)
    tiny.assert_rounded_alike(skipped, compiled(model)(variables, *ARRAYS, 1))


# Tasks


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.SEQ2SEQ_TOGETHER)
def test_every_method_keeps_tasks_apart(name: str) -> None:
    """A mixed batch gives what each task gives alone, and a task's loss moves its rows alone."""
    model = tiny.seq2seq(tiny.SEQ2SEQ_TOGETHER[name])
    variables = tiny.variables(model)
    step = jax.jit(lambda v, tasks: (model.apply(v, *ARRAYS, tasks), jax.grad(total)(v, tasks)))

    def total(variables: Any, tasks: Any) -> Any:
        return loss(model, variables, tasks)

    mixed, _ = step(variables, np.array([2, 0, 1, 2]))
    alone, gradients = zip(*(step(variables, np.full(4, task)) for task in range(3)), strict=True)
    expected = np.stack([alone[task][row] for row, task in enumerate([2, 0, 1, 2])])
    tiny.assert_rounded_alike(mixed, expected)
    assert not np.allclose(alone[0], alone[1], atol=1e-2)
    leaves = jax.tree_util.tree_leaves_with_path(gradients[1]["adapters"])
    for path, leaf in leaves:
        assert not leaf[0].any(), path
        assert not leaf[2].any(), path
        assert leaf[1].any(), path


def test_adding_and_taking_tasks_is_indexing() -> None:
    model = tiny.seq2seq(methods.lora(2) + methods.layer_norms())
    variables, params = tiny.variables(model), None
    params = variables["params"]
    new = task_axis.fresh(model.config, (1,), model.method, params, jax.random.key(0))
    four = task_axis.append(variables["adapters"], new)
    more = model.clone(num_tasks=4)
    logits = compiled(model)(variables, *ARRAYS, 1)
    added = compiled(more)({"params": params, "adapters": four}, *ARRAYS, 1)
    tiny.assert_rounded_alike(added, logits)
    norms = new["decoder.layer_norms"]["layers"]["cross_attention_norm"]["scale"]
    np.testing.assert_array_equal(
        norms[0], params["decoder"]["layers"]["cross_attention_norm"]["scale"]
    )


# Where methods act


def names(method: methods.Method, block: str) -> list[tuple[str, str]]:
    return [(place.name, place.site) for place in places(method, block)]


def test_places_of_a_method() -> None:
    """By default everywhere, as in He et al.: at three attentions, at two feed-forward blocks."""
    prefix, parallel = methods.mam()
    assert names((prefix, parallel), "encoder") == [
        ("prefix", "attention.heads"),
        ("ffn_adapter", "ffn.output"),
    ]
    assert names((prefix, parallel), "decoder") == [
        ("decoder.prefix", "attention.heads"),
        ("decoder.cross.prefix", "cross_attention.heads"),
        ("decoder.ffn_adapter", "ffn.output"),
    ]
    assert not names(methods.prompt_tuning(), "decoder")


def test_a_method_can_be_restricted() -> None:
    lora = parse_method("lora(rank=2, blocks=('decoder',), attention=['cross']) + adapter")
    assert lora[:-1] == within(methods.lora(2), ("decoder",), ("cross",))
    assert names(lora, "encoder") == [("ffn_adapter", "ffn.output")]
    assert [name for name, _ in names(lora, "decoder")] == [
        *("decoder.cross.lora_query", "decoder.cross.lora_value", "decoder.ffn_adapter"),
    ]
    assert parse_method(dumps(lora)) == lora
    top = within(methods.top_ffn(6, 2), ("decoder",))
    assert parse_method("top_ffn(size=6, blocks=2)") == methods.top_ffn(6, 2)
    assert parse_method("top_ffn(size=6, blocks=('decoder',))") == within(
        methods.top_ffn(6), ("decoder",)
    )
    assert names(top, "decoder") == [("decoder.top", "top")]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lora(blocks='decoder')", "blocks is a list of some of encoder, decoder, not 'decoder'"),
        ("lora(attention=('causal',))", r"attention is a list of some of self, cross"),
        ("adapter(attention=('cross',))", "leave it out"),
        ("pooler", "'pooler' has no place in this model, whose blocks are encoder and decoder"),
        ("lora(blocks=('encoder',), attention=('cross',))", "'lora_query' has no place"),
        ("prompt_tuning(blocks=('decoder',))", "'prompt' has no place"),
        ("layer_norms + bitfit", "'layer_norms' and 'biases' collide at .*norm/bias"),
    ],
)
def test_places_that_do_not_exist(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        variable_shapes(tiny.seq2seq(parse_method(expression)))


def test_an_encoder_has_no_place_for_what_acts_in_a_decoder() -> None:
    message = "'lora_query' has no place in this model, whose blocks are encoder;"
    with pytest.raises(UserError, match=message):
        variable_shapes(tiny.model(parse_method("lora(blocks=('decoder',))")))


# Parameters stored for one task on BART-large (golden/unified_view_seq2seq/README.md, section 7).
@pytest.mark.parametrize(
    ("expression", "per_task", "share"),
    [
        ("prefix_tuning(length=200, bottleneck=0)", 14_745_600, 0.0363),
        ("prefix_tuning(length=200)", 62_130_528, None),  # in training
        ("mam(prefix=30, size=512, scale=4.0)", 27_414_528, 0.0675),
        ("scaled_parallel(size=512)", 25_202_688, 0.0620),
        ("lora(rank=200)", 29_491_200, 0.0726),
        ("lora(rank=102, targets=('ffn_in', 'ffn_out'))", 25_067_520, 0.0617),
        ("prompt_tuning(length=300)", 307_200, 0.0008),
        ("bitfit", 333_824, 0.0008),
    ],
)
def test_counts_on_bart_large(expression: str, per_task: int, share: float | None) -> None:
    counted = counts.count(Seq2SeqModel(BartConfig(), 2, parse_method(expression)))
    assert counted.encoder == 406_291_456
    assert counted.per_task == per_task
    if share:
        assert counted.per_task / counted.encoder == pytest.approx(share, abs=5e-5)


def test_shapes_are_those_of_the_model() -> None:
    for model_type in MODEL_TYPES:
        model = tiny.seq2seq(methods.houlsby(4) + methods.lora(2), model_type=model_type)
        traced = jax.eval_shape(lambda m=model: init_variables(m, jax.random.key(0)))
        assert variable_shapes(model) == traced


@pytest.mark.parametrize("expression", ["lora(rank=2, targets=('query', 'ffn_in'))", "ia3"])
def test_merged_weights_give_the_same(expression: str) -> None:
    model = tiny.seq2seq(parse_method(expression) + methods.adapter(3) + methods.layer_norms())
    variables = tiny.variables(model)
    alone, merged = merge.merged(model, variables, 1)
    assert [part.name for part in alone.method] == ["ffn_adapter"]
    assert set(merged["adapters"]) == {"ffn_adapter", "decoder.ffn_adapter"}
    expected = compiled(model)(variables, *ARRAYS, 1)
    actual = compiled(alone)(merged, *ARRAYS, 0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
