"""The loss of target texts: as in the original code, row by row, differentiated where needed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from pals_jax.models.bart import Vocabulary
from pals_jax.training.losses import texts_loss, token_losses
from pals_jax.training.plan.flops import of_products

MODEL = tiny.seq2seq()
B, K, D, V = 3, 5, 12, 31
SMOOTHING = 0.1


def inputs() -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """The vocabulary, hidden states, labels and weights, some of which are 0."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, K, D)).astype(np.float32)
    weights = rng.integers(0, 3, (B, K)).astype(np.float32)
    vocabulary = tiny.variables(MODEL)["params"]["vocabulary"]
    return vocabulary, hidden, rng.integers(0, V, (B, K)), weights


def of_all_logits(vocabulary: Any, hidden: Any, labels: Any, weights: Any) -> Any:
    words = Vocabulary(MODEL.config)
    logits = words.apply({"params": vocabulary}, hidden, method="logits")
    return jnp.sum(token_losses(logits, labels, SMOOTHING) * weights)


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_token_losses_are_those_of_numpy(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (2, 4, V)).astype(np.float32), rng.integers(0, V, (2, 4))
    losses = -scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    of_labels = np.take_along_axis(losses, labels[..., None], axis=-1)[..., 0]
    expected = (1 - smoothing) * of_labels + smoothing * losses.mean(-1)
    np.testing.assert_allclose(token_losses(logits, labels, smoothing), expected, rtol=1e-5)


@pytest.mark.parametrize("with_respect_to", [(0,), (1,), (0, 1)])
def test_the_loss_of_rows_is_that_of_all_logits(with_respect_to: tuple[int, ...]) -> None:
    """And its gradients, of the vocabulary, of the hidden states, and of both, scaled."""
    vocabulary, hidden, labels, weights = inputs()
    loss = texts_loss(MODEL, SMOOTHING)

    def scaled(function: Any) -> Any:
        return lambda v, h: 3.0 * function(v, h, labels, weights)

    (ours, gradients), (expected, theirs) = (
        jax.jit(jax.value_and_grad(scaled(f), with_respect_to))(vocabulary, hidden)
        for f in (loss, of_all_logits)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # noqa: E731
    jax.tree.map(close, gradients, theirs)
    if 0 in with_respect_to:
        assert not gradients[0]["logits_bias"].any()  # which is not trained
    np.testing.assert_allclose(loss(*inputs()), expected / 3.0, rtol=1e-6)


def test_a_frozen_vocabulary_is_not_differentiated_and_nothing_is_computed_twice() -> None:
    vocabulary, hidden, labels, weights = inputs()
    loss = texts_loss(MODEL, SMOOTHING)
    products = 2 * B * K * D * V  # of the hidden states with all words
    for with_respect_to, count in ((1, 2), ((0, 1), 3)):
        gradients = jax.grad(lambda v, h: loss(v, h, labels, weights), with_respect_to)
        assert of_products(gradients, vocabulary, hidden) == count * products
