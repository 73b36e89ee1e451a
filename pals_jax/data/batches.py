"""Examples into padded arrays of few static shapes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pals_jax.data.sampler import Draw
from pals_jax.data.tokenize import TokenizedSplit

Batch = dict[str, np.ndarray]

# A batch is padded to the next of these shares of the maximal length, not always to all of it:
# GLUE sentences are short. Each length is one more compilation.
_LENGTHS = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an encoder takes.

    Attributes:
        max_length: the largest number of tokens of an example.
        pad_id: the token that fills rows up.
        token_types: how many the encoder tells apart; where it is one, every token is of type 0.
    """

    max_length: int
    pad_id: int = 0
    token_types: int = 2


def padded_length(longest: int, max_length: int) -> int:
    """The static length for examples of at most `longest` tokens."""
    return next(n for n in (int(np.ceil(s * max_length)) for s in _LENGTHS) if n >= longest)


def train_batch(
    splits: Sequence[TokenizedSplit], draw: Draw, layout: Layout, first_task: int = 0
) -> Batch:
    """The batch of a draw.

    Args:
        splits: the training examples of each of the T tasks.
        draw: the tasks [G] and examples [G, b].
        layout: what the encoder takes.
        first_task: the place on the model's task axis of the first of these tasks.

    Returns:
        input_ids, token_type_ids, attention_mask: int32 [G * b, L]; task_ids: int32 [G];
        targets, weights: float32 [G * b].
    """
    rows = [
        (splits[task], int(index))
        for task, examples in zip(draw.task_ids.tolist(), draw.examples, strict=True)
        for index in examples
    ]
    return _pad(rows, len(rows), layout) | {"task_ids": draw.task_ids + np.int32(first_task)}


def eval_batches(
    split: TokenizedSplit, task_id: int, batch_size: int, layout: Layout
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example of a split once, short ones first; the last batch is filled with weight 0.

    Yields:
        The batch of `batch_size` rows, and the indices int64 [n] of the examples in its first n.
    """
    order = np.argsort(split.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = _pad([(split, int(i)) for i in indices], batch_size, layout)
        yield batch | {"task_ids": np.array([task_id], np.int32)}, indices


def _pad(rows: Sequence[tuple[TokenizedSplit, int]], num_rows: int, layout: Layout) -> Batch:
    examples = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for split, i in rows]
    shape = (num_rows, padded_length(max(map(len, examples)), layout.max_length))
    input_ids = np.full(shape, layout.pad_id, np.int32)
    token_type_ids, attention_mask = (np.zeros(shape, np.int32) for _ in range(2))
    targets, weights = (np.zeros(num_rows, np.float32) for _ in range(2))
    for row, (tokens, (split, i)) in enumerate(zip(examples, rows, strict=True)):
        input_ids[row, : len(tokens)] = tokens
        token_type_ids[row, split.first[i] : len(tokens)] = layout.token_types > 1
        attention_mask[row, : len(tokens)] = 1
        targets[row] = split.targets[i]
        weights[row] = 1.0
    return {
        "input_ids": input_ids,
        "token_type_ids": token_type_ids,
        "attention_mask": attention_mask,
        "targets": targets,
        "weights": weights,
    }
