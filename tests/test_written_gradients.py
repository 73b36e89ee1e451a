"""Gradients that are written by hand equal those that JAX derives from the formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pals_jax.models.attention import dot_product_attention
from pals_jax.models.dropout import dropped, example_salts, keep_mask
from pals_jax.models.layers import gradient_materialised, layer_norm, materialised
from pals_jax.models.segments import Segments, cross_segments, make_segments

RATE = 0.3


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(function: Any, *inputs: Array) -> Any:
    """Of a sum in which each result has other weights, and of the results themselves."""

    def total(*inputs: Array) -> tuple[Array, Any]:
        results = function(*inputs)
        leaves = jax.tree.leaves(results)
        weighted = (jnp.vdot(normal(i, *x.shape), x) for i, x in enumerate(leaves))
        return sum(weighted, jnp.float32(0)), results

    return jax.jit(jax.value_and_grad(total, tuple(range(len(inputs))), has_aux=True))(*inputs)


def assert_alike(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), one, other)


def error(found: Array, exact: Array) -> float:
    """The norm of the difference, relative to that of what is exact."""
    difference = found.astype(jnp.float32) - exact
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm(dtype: Any) -> None:
    def plain(x: Array, scale: Array, bias: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * scale[None, None] + bias[None, None]

    inputs = 3 * normal(0, 2, 5, 12) + 1, normal(1, 12), normal(2, 12)
    rounded = inputs[0].astype(dtype), *inputs[1:]
    written = gradients(lambda *x: layer_norm(*x, 1e-5, dtype), *rounded)
    exact = gradients(plain, rounded[0].astype(jnp.float32), *inputs[1:])
    assert written[1][0].dtype == dtype
    if dtype == jnp.float32:
        assert_alike(written, exact)
    else:
        assert max(error(*pair) for pair in zip(written[1], exact[1], strict=True)) < 0.01


IDS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0]])
ALONE = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
SOURCES = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
SOURCES_ALONE = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("rate", [0.0, RATE])
@pytest.mark.parametrize(
    ("ids", "sources"),
    [(IDS, None), (IDS, SOURCES), (ALONE, SOURCES_ALONE)],
    ids=["self", "cross, packed", "cross, one mask for all queries"],
)
def test_attention(ids: np.ndarray, sources: np.ndarray | None, rate: float) -> None:
    """Of rows with one example or two, with padding; the log of the denominator, too."""
    key = jax.random.key(3)

    def of(ids: np.ndarray, second: int) -> Segments:
        """Two rows; where the first has two examples, the second of them begins at `second`."""
        count = int(ids.max())
        first, examples = jnp.array([[0, second], [0, 0]]), jnp.array([[4, 5], [6, 7]])
        return make_segments(
            jnp.asarray(ids), first[:, :count], example_salts(key, examples[:, :count])
        )

    segments = of(ids, 3)
    if sources is not None:
        segments = cross_segments(segments, of(sources, 2))

    def written(*inputs: Array) -> tuple[Array, Array]:
        return dot_product_attention(*inputs, segments, dropout_rate=rate, dropout_key=key)

    def plain(query: Array, keys: Array, value: Array) -> tuple[Array, Array]:
        scores = jnp.einsum("bhqk,bhsk->bhqs", query, keys) / np.sqrt(np.float32(4))
        scores = jnp.where(segments.mask, scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1)
        keep = keep_mask(key, rate, segments.places, scores.shape, segments.key_position)
        heads = jnp.einsum("bhqs,bhsk->bhqk", dropped(weights, keep, rate), value)
        return heads, jax.nn.logsumexp(scores, axis=-1)

    attended = ids if sources is None else sources
    lengths = ids.shape[1], attended.shape[1], attended.shape[1]
    inputs = [normal(seed, 2, 3, length, 4) for seed, length in enumerate(lengths)]
    assert_alike(gradients(written, *inputs), gradients(plain, *inputs))


def test_attention_in_bfloat16() -> None:
    """The gradients of queries are exact to bfloat16 though keys and values are far from 0."""
    ids = jnp.ones((1, 128), jnp.int32)
    segments = make_segments(ids, jnp.zeros((1, 1), jnp.int32))
    shifted = (normal(0, 1, 2, 128, 64), 3 + normal(1, 1, 2, 128, 64), 3 + normal(2, 1, 2, 128, 64))

    def heads(*inputs: Array) -> Array:
        return dot_product_attention(*inputs, segments)[0].astype(jnp.float32)

    rounded = tuple(x.astype(jnp.bfloat16) for x in shifted)
    _, (exact, *_) = gradients(heads, *(x.astype(jnp.float32) for x in rounded))
    _, (found, *_) = gradients(heads, *rounded)
    assert error(found, exact) < 0.03


@pytest.mark.parametrize("function", [materialised, gradient_materialised])
def test_what_is_materialised_is_the_same(function: Any) -> None:
    x = normal(0, 3, 4)
    assert_alike(gradients(function, x), gradients(lambda x: x, x))
