"""The losses of a batch: of each example of an encoder, of each token that a decoder writes.

The loss of a step is their weighted mean, over all devices.

Dimension letters: see `pals_jax.data.batch`; D hidden size, C classes, V words.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from pals_jax.data.batch import Batch, TargetTexts
from pals_jax.inference.steps import apply_to_batch
from pals_jax.models.architectures import Model
from pals_jax.models.bart import Vocabulary
from pals_jax.models.seq2seq import Seq2SeqModel


def summed_loss(
    model: Model,
    variables: optax.Params,
    batch: Batch,
    slot_ids: Array,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> Array:
    """The weighted sum of the losses of a batch's examples, or of the tokens of its targets.

    Args:
        model: the model.
        variables: its variables; the `adapters` collection is that of the step's slots.
        batch: the batch; its `task_ids` are on the model's task axis.
        slot_ids: int [G]; the slot of each group's task.
        label_smoothing: see `token_losses`; without effect on classes and values.
        **kwargs: passed to the model.
    """
    in_slots = batch.replace(task_ids=slot_ids)
    if isinstance(model, Seq2SeqModel):
        texts = batch.target_texts
        assert texts is not None
        hidden = apply_to_batch(model, variables, in_slots, method="decode", **kwargs)
        loss = texts_loss(model, label_smoothing)
        vocabulary = variables["params"]["vocabulary"]
        return loss(vocabulary, hidden, texts.labels, token_weights(texts, batch.weights))
    logits = apply_to_batch(model, variables, in_slots, batch.slot_tasks, **kwargs)
    is_regression = np.asarray(model.num_outputs) == 1
    losses = _of_examples(logits, batch, is_regression)
    return jnp.sum(losses * batch.weights.reshape(-1))


def loss_weights(batch: Batch) -> Array:
    """The weights of all losses of a batch, float32 [n], in the order of its rows.

    A token of a target has the weight of its example, as in the code of He et al. (2022).
    """
    if batch.target_texts is None:
        return batch.weights.reshape(-1)
    return token_weights(batch.target_texts, batch.weights).reshape(-1)


def example_losses(logits: Array, targets: Array, is_regression: Array) -> Array:
    """Each example's loss: cross-entropy, or the squared error of the first logit.

    Args:
        logits: float32 [B, C]; the lowest finite value beyond a task's own outputs.
        targets: float32 [B]; a class id, or a regression target.
        is_regression: bool [B].

    Returns:
        float32 [B].
    """
    labels = jnp.where(is_regression, 0, targets).astype(jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(is_regression, jnp.square(logits[:, 0] - targets), cross_entropy)


def _of_examples(logits: Array, batch: Batch, is_regression: np.ndarray) -> Array:
    """The losses [B * M] of all examples; `is_regression`, bool [T], of the tasks."""
    assert batch.targets is not None
    per_group = batch.targets.size // len(batch.task_ids)
    regression = jnp.repeat(jnp.asarray(is_regression)[batch.task_ids], per_group)
    outputs = logits.reshape(-1, logits.shape[-1])
    return example_losses(outputs, batch.targets.reshape(-1), regression)


def token_losses(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """Each token's loss: (1 - s) (-log p(label)) + s mean_v (-log p(v)), over all words v.

    As in the code of He et al. (2022), whose smoother is that of transformers: the label, padding
    and other special tokens are among the words.

    Args:
        logits: float32 [..., K, V].
        labels: int32 [..., K].
        label_smoothing: s.

    Returns:
        float32 [..., K].
    """
    of_labels = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    aim = of_labels
    if label_smoothing:
        aim = (1.0 - label_smoothing) * of_labels + label_smoothing * jnp.mean(logits, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - aim


def token_weights(texts: TargetTexts, weights: Array) -> Array:
    """The weights, float32 [B, K], of tokens whose examples have `weights` [B, M]; 0 at padding."""
    example = jnp.maximum(texts.attention_mask - 1, 0)
    own = jnp.take_along_axis(weights, example, axis=1)
    return jnp.where(texts.attention_mask > 0, own, 0.0)


def texts_loss(
    model: Seq2SeqModel, label_smoothing: float
) -> Callable[[Any, Array, Array, Array], Array]:
    """The weighted sum of the losses of all tokens of a batch's targets, one row at a time.

    The logits of a batch, [B, K, V], would be the largest array of a step by far. A row's gradient
    is computed while its logits are there, so that they are neither kept nor computed again.

    Returns:
        A function of the vocabulary's parameters, the decoder's hidden states [B, K, D], labels
        int32 [B, K] and weights float32 [B, K]; it is differentiable in the first two.
    """

    def of_row(vocabulary: Any, hidden: Array, labels: Array, weights: Array) -> Array:
        words = Vocabulary(model.config, model.dtype, parent=None)
        logits: Any = words.apply({"params": vocabulary}, hidden[None], method="logits")
        return jnp.sum(token_losses(logits[0], labels, label_smoothing) * weights)

    @jax.custom_vjp
    def loss(vocabulary: Any, hidden: Array, labels: Array, weights: Array) -> Array:
        rows = hidden, labels, weights
        return jnp.sum(jax.lax.map(lambda row: of_row(vocabulary, *row), rows))

    def forward(vocabulary: Any, *rows: Any) -> tuple[Array, tuple[Any, Array]]:
        is_trained = any(x.perturbed for x in jax.tree.leaves(vocabulary))
        vocabulary, rows = jax.tree.map(lambda x: x.value, (vocabulary, rows))
        with_gradients = jax.value_and_grad(of_row, argnums=(0, 1) if is_trained else (1,))

        def step(before: Any, row: Any) -> tuple[Any, tuple[Array, Array]]:
            loss, (*of_vocabulary, of_hidden) = with_gradients(vocabulary, *row)
            return jax.tree.map(jnp.add, before, of_vocabulary), (loss, of_hidden)

        start = [jax.tree.map(jnp.zeros_like, vocabulary)] if is_trained else []
        of_vocabulary, (losses, of_hidden) = jax.lax.scan(step, start, rows)
        return jnp.sum(losses), (of_vocabulary, of_hidden)

    def backward(kept: tuple[Any, Array], factor: Array) -> tuple[Any, ...]:
        of_vocabulary, of_hidden = jax.tree.map(lambda x: (x * factor).astype(x.dtype), kept)
        return (of_vocabulary[0] if of_vocabulary else None, of_hidden, None, None)

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss
