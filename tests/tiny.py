"""Tiny models, batches and training steps, so small that a test's time is mostly compilation."""

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from pals_jax.data.batch import Batch
from pals_jax.data.tokenized import TokenizedSplit, TokenizedTargets
from pals_jax.experiment.optim import make_optimizer
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Context
from pals_jax.models.architectures import Model, num_tasks
from pals_jax.models.bart import BartConfig
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.shapes import variable_shapes
from pals_jax.training.step import create_state, make_train_step

NUM_OUTPUTS = (2, 1, 3)  # two classes, regression, three classes
TOTAL_STEPS = 10

# Every method at a size that fits the tiny encoder (12 wide).
METHODS = {
    "pals": methods.pals(size=6, heads=3),
    "pals, V not shared": methods.pals(size=6, heads=3, shared=False),
    "low_rank": methods.low_rank(size=5),
    "pals, serial": methods.pals(size=6, heads=3, serial=True),
    "projected_ffn": methods.projected_ffn(size=5, depth=2),
    "lhuc": methods.lhuc(),
    "bert_n_pals_houlsby": methods.bert_n_pals_houlsby(size=5),
    "houlsby_plus_pals": methods.houlsby_plus_pals(size=6, attention_size=4, heads=2),
    "top_attention": methods.top_attention(size=6, blocks=2, heads=2),
    "top_ffn": methods.top_ffn(size=6, blocks=2),
    "top_layer": methods.top_layer(),
    "top_dense": methods.top_dense(),
    "pooler": methods.pooler(),
    "mean_pooling": methods.mean_pooling(),
    "houlsby": methods.houlsby(size=5),
    "layer_norms": methods.layer_norms(),
    "top_layers": methods.top_layers(2),
    "prefix_tuning": methods.prefix_tuning(4, bottleneck=7),
    "prefix_tuning, flat, ungated": methods.prefix_tuning(4, bottleneck=0, gated=False),
    "prompt_tuning": methods.prompt_tuning(3),
    "lora": methods.lora(2, 4.0, tuple(methods.LORA_SITES)),
    "adapter": methods.adapter(5),
    "pfeiffer": methods.pfeiffer(5),
    "parallel": methods.parallel(5, site="attention"),
    "scaled_parallel": methods.scaled_parallel(5, scale="learned"),
    "multi_head_parallel": methods.multi_head_parallel(4),
    "mam": methods.mam(3, 5),
    "bitfit": methods.bitfit(),
    "ia3": methods.ia3(),
}

# All methods again, combined into few models whose methods do not collide. The encoder is most of
# a test's cost, and a property of every parameter of such a model holds for each of its methods.
TOGETHER = {
    " + ".join(names): sum((METHODS[name] for name in names), ())
    for names in (
        ("pals", "low_rank", "bert_n_pals_houlsby", "lhuc", "pooler", "prefix_tuning"),
        ("pals, V not shared", "top_ffn", "houlsby", "prefix_tuning, flat, ungated", "ia3"),
        ("pals, serial", "top_layer", "top_layers", "adapter"),
        ("houlsby_plus_pals", "top_dense", "pfeiffer", "bitfit"),
        ("scaled_parallel", "parallel", "top_attention", "layer_norms", "prompt_tuning"),
        ("mam", "multi_head_parallel", "lora", "projected_ffn", "mean_pooling"),
    )
}


# The same for encoder-decoders, which have no pooler.
OF_POOLERS = ("pooler", "mean_pooling")
SEQ2SEQ_TOGETHER = {
    text: sum((METHODS[name] for name in text.split(" + ") if name not in OF_POOLERS), ())
    for text in TOGETHER
}


def config(**changes: Any) -> BertConfig:
    """A tiny architecture without dropout, with `changes`."""
    sizes = {
        "vocab_size": 31,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 9,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**sizes | changes)


def bart_config(**changes: Any) -> BartConfig:
    """A tiny encoder-decoder without dropout, with `changes`; its stacks differ in every size."""
    sizes = {
        "vocab_size": 31,
        "d_model": 12,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 9,
        "dropout": 0.0,
    }
    return BartConfig(**sizes | changes)


def seq2seq(method: methods.Method = (), **changes: Any) -> Seq2SeqModel:
    """A model of three tasks with a method, on the tiny encoder-decoder with `changes`."""
    return Seq2SeqModel(bart_config(**changes), 3, method)


def texts(seed: int = 0, rows: int = 4) -> dict[str, np.ndarray]:
    """Sources [B, 7] and targets [B, 5] with different amounts of padding."""
    source, target = inputs(seed, rows), inputs(seed + 1, rows, length=5)
    return {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": target["attention_mask"][::-1],
    }


def model(method: methods.Method, **changes: Any) -> MultiTaskModel:
    """A model of three tasks with a method, on the tiny architecture with `changes`."""
    return MultiTaskModel(config(**changes), NUM_OUTPUTS, method)


def variables(model: Model, seed: int = 0) -> Any:
    """Random values in every leaf, biases too; layer norms' scales are around 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        values = rng.normal(0.0, 0.3, leaf.shape) + (path[-1].key == "scale")
        return values.astype(leaf.dtype)

    values = jax.tree_util.tree_map_with_path(draw, shapes(model))
    return jax.device_put(values)  # all at once, because a call per leaf takes as long as a step


@cache
def shapes(model: Model) -> Any:
    """`variable_shapes`, traced once for each model."""
    return variable_shapes(model)


def inputs(seed: int = 0, rows: int = 4, length: int = 7) -> dict[str, np.ndarray]:
    """Token arrays [B, L] with token types; their rows have different amounts of padding."""
    rng = np.random.default_rng(seed)
    lengths = length - np.arange(rows) % (length - 1)
    mask = np.arange(length) < lengths[:, None]
    return {
        "input_ids": rng.integers(1, 31, (rows, length), dtype=np.int32),
        "token_type_ids": rng.integers(0, 2, (rows, length), dtype=np.int32),
        "attention_mask": mask.astype(np.int32),
    }


def batch(task_ids: Any, seed: int = 0, rows: int = 4) -> Batch:
    """A training batch; its targets are class 0 or 1, valid for every task."""
    targets = np.random.default_rng(seed).integers(0, 2, rows).astype(np.float32)
    return Batch(
        **inputs(seed, rows),
        task_ids=np.asarray(task_ids, np.int32),
        first=np.zeros((rows, 1), np.int32),
        example_ids=np.arange(rows, dtype=np.int32)[:, None],
        targets=targets[:, None],
        weights=np.ones((rows, 1), np.float32),
    )


def split(rng: np.random.Generator, pairs: bool = False) -> TokenizedSplit:
    """Eleven examples of 3 to 9 tokens; pairs, with targets of 2 to 9."""
    lengths = rng.integers(3, 10, 11)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(1, 31, offsets[-1]).astype(np.int32)
    made = TokenizedSplit(tokens, offsets, lengths - 1, rng.integers(0, 2, 11).astype(np.float32))
    if not pairs:
        return made
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 11, 11))])  # with the start tokens
    tokens = rng.integers(1, 31, offsets[-1]).astype(np.int32)
    return dataclasses.replace(made, target_texts=TokenizedTargets(tokens, offsets))


class Probe:
    """A form without parameters that adds nothing and records its inputs.

    `seen` holds x and the data of the dropout key (or None) of each call, in unspecified order.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def parameters(self, inputs: int, outputs: int, config: BertConfig) -> dict[str, Any]:
        return {}

    def __call__(self, params: Any, x: Any, context: Context) -> Any:
        key = context.dropout_key
        data = None if key is None else jax.random.key_data(key)
        jax.debug.callback(lambda *seen: self.seen.append(seen), x, data)
        return jnp.zeros_like(x)


def optimizer_config(name: str = "adamw", **changes: Any) -> ConfigDict:
    """The `config.optimizer` of an experiment, with `changes`."""
    values = {
        "name": name,
        "schedule": "bert",
        "learning_rate": 1e-3,
        "warmup": 0.3,
        "weight_decay": 0.01,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-6,
        "clip": 1.0,
    }
    return ConfigDict(values | changes)


def recording(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, with the last gradients beside its state: opt_state is (state, gradients)."""

    def init(params: Any) -> Any:
        return optimizer.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(grads: Any, state: Any, params: Any, **extra: Any) -> Any:
        updates, inner = optimizer.update(grads, state[0], params, **extra)
        return updates, (inner, grads)

    return optax.GradientTransformationExtraArgs(init, update)


def training(
    model: Model, rules: tuple[str, ...] = ("params/", "adapters/"), **changes: Any
) -> tuple[Any, Any]:
    """A jitted training step whose opt_state also holds the gradients, and its first state."""
    optimizer, _ = make_optimizer(
        optimizer_config(**changes), num_tasks(model), total_steps=TOTAL_STEPS
    )
    optimizer = recording(optimizer)
    # Compiled as one program, because op by op it takes longer than the step.
    state = jax.jit(lambda variables: create_state(variables, rules, optimizer))(variables(model))
    # Without effect on an encoder.
    return jax.jit(make_train_step(model, optimizer, seed=0, label_smoothing=0.1)), state


@cache
def pals_training() -> tuple[Any, Any]:
    """`training` of everything with PALs, compiled once for all tests."""
    return training(MultiTaskModel(config(), NUM_OUTPUTS, METHODS["pals"]))


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Test parameters; those in `quick` run by default, the others in the slow tier."""
    cases = list(cases)
    assert all(case in cases for case in quick)
    slow = pytest.mark.slow
    return [pytest.param(case, marks=() if case in quick else slow) for case in cases]


def rows(tree: Any, task: int) -> Any:
    """One task's rows, as NumPy arrays, of a tree whose leaves have a leading task axis."""
    return jax.tree.map(lambda x: np.asarray(x)[task], tree)


def assert_same(actual: Any, desired: Any) -> None:
    """Two trees are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


# Two programs may add the terms of a sum in different orders, and processors fuse multiplication
# and addition differently. On three layers of tiny models, the observed differences were up to 7
# spacings of float32 at the array's largest magnitude (SSE4.2 to AVX-512, JAX 0.10 and 0.12).
SPACINGS = 16


def assert_rounded_alike(actual: Any, desired: Any) -> None:
    """Two trees from two programs are equal but for rounding, at the scale of each array."""

    def close(a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        # The lowest finite values stand for absent outputs and must not set the scale.
        scale = np.abs(b[np.abs(b) < 1e30]).max(initial=np.float32(0))
        bound = SPACINGS * np.spacing(np.float32(scale))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)

    jax.tree.map(close, actual, desired)


def moved(before: Any, after: Any) -> list[bool]:
    """For each leaf, whether any of its entries changed."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [bool((np.asarray(a) != np.asarray(b)).any()) for a, b in pairs]
