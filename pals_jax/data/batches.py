"""Examples into padded arrays of few static shapes."""

from collections.abc import Iterator, Sequence

import numpy as np

from pals_jax.data.sampler import Draw
from pals_jax.data.tokenize import TokenizedSplit

Batch = dict[str, np.ndarray]

# A batch is padded to the next of these shares of the maximal length, not always to all of it:
# GLUE sentences are short. Each length is one more compilation.
_LENGTHS = (0.25, 0.5, 0.75, 1.0)


def padded_length(longest: int, max_length: int) -> int:
    """The static length for examples of at most `longest` tokens."""
    return next(n for n in (int(np.ceil(s * max_length)) for s in _LENGTHS) if n >= longest)


def train_batch(splits: Sequence[TokenizedSplit], draw: Draw, max_length: int) -> Batch:
    """The batch of a draw.

    Args:
        splits: the training examples of each of the T tasks.
        draw: the tasks [G] and examples [G, b].
        max_length: the largest number of tokens of an example.

    Returns:
        input_ids, token_type_ids, attention_mask: int32 [G * b, L]; task_ids: int32 [G];
        targets, weights: float32 [G * b].
    """
    rows = [
        (splits[task], int(index))
        for task, examples in zip(draw.task_ids.tolist(), draw.examples, strict=True)
        for index in examples
    ]
    return _pad(rows, len(rows), max_length) | {"task_ids": draw.task_ids}


def eval_batches(
    split: TokenizedSplit, task_id: int, batch_size: int, max_length: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example of a split once, short ones first; the last batch is filled with weight 0.

    Yields:
        The batch of `batch_size` rows, and the indices int64 [n] of the examples in its first n.
    """
    order = np.argsort(split.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = _pad([(split, int(i)) for i in indices], batch_size, max_length)
        yield batch | {"task_ids": np.array([task_id], np.int32)}, indices


def _pad(rows: Sequence[tuple[TokenizedSplit, int]], num_rows: int, max_length: int) -> Batch:
    examples = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for split, i in rows]
    shape = (num_rows, padded_length(max(map(len, examples)), max_length))
    input_ids, token_type_ids, attention_mask = (np.zeros(shape, np.int32) for _ in range(3))
    targets, weights = (np.zeros(num_rows, np.float32) for _ in range(2))
    for row, (tokens, (split, i)) in enumerate(zip(examples, rows, strict=True)):
        input_ids[row, : len(tokens)] = tokens
        token_type_ids[row, split.first[i] : len(tokens)] = 1
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
