"""The batch: what a step reads, as one type.

Dimension letters: B rows, L positions, K positions of target texts, M slots for examples in a row,
D hidden size, G task groups, U slots of tasks. On the host every array has a
leading axis of this host's shards, which `DataParallel.compile` removes.
"""

from typing import Any

from flax import struct

Array = Any  # np.ndarray on the host, jax.Array in a step


class TargetTexts(struct.PyTreeNode):
    """The texts that an encoder-decoder is to write, in the rows and slots of their sources.

    Attributes:
        input_ids: int32 [B, K]; what the decoder reads: each text behind its start token.
        labels: int32 [B, K]; the token that follows each position.
        attention_mask: int32 [B, K]; as that of the sources.
        first: int32 [B, M]; the position of each example's start token.
    """

    input_ids: Array
    labels: Array
    attention_mask: Array
    first: Array


class Batch(struct.PyTreeNode):
    """B rows of one or more examples each, the input of training and evaluation steps.

    An example's target is a number, in `targets`, or a text, in `target_texts`; the other is None.

    Attributes:
        input_ids: int32 [B, L].
        token_type_ids: int32 [B, L]. None: the model has no types of tokens.
        attention_mask: int32 [B, L]; 0 at padding, else the number, from 1, of the row's example
            that a position belongs to.
        first: int32 [B, M]; the position of each example's first token.
        example_ids: int32 [B, M]; the index of each example in the whole batch, -1 in empty slots.
            An example's dropout masks are a function of this index.
        targets: float32 [B, M]; a class id, or a regression target. None: the targets are texts.
        weights: float32 [B, M]; a weight of 0 leaves an example out of the loss.
        task_ids: int32 [G]; on the model's task axis, the tasks of G equal, consecutive groups of
            rows.
        slot_tasks: int32 [U]; on the model's task axis, the task of each of the U slots of a step.
            They differ and include all of `task_ids`. None: every task has a slot.
        hidden: [B, L, D] in the compute dtype; the hidden states below the first adapter, from
            which the encoder starts. None: it starts from the tokens.
        target_texts: the targets that are texts. None: the targets are numbers.
    """

    input_ids: Array
    token_type_ids: Array | None
    attention_mask: Array
    first: Array
    example_ids: Array
    targets: Array | None
    weights: Array
    task_ids: Array
    slot_tasks: Array | None = None
    hidden: Array | None = None
    target_texts: TargetTexts | None = None

    @property
    def tokens(self) -> tuple[Array, Array, Array]:
        """input_ids, token_type_ids, attention_mask: the first arguments of an encoder."""
        return self.input_ids, self.token_type_ids, self.attention_mask
