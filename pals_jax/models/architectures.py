"""The two kinds of models, by their architecture: encoders with heads, and encoder-decoders."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from pals_jax.models.adapters.spec import Method
from pals_jax.models.bart import MODEL_TYPES, BartConfig
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel

Architecture: TypeAlias = BertConfig | BartConfig
Model: TypeAlias = MultiTaskModel | Seq2SeqModel


def new_model(
    architecture: Architecture,
    num_outputs: Sequence[int],
    method: Method = (),
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """The model of some tasks, without weights.

    Args:
        architecture: of its encoder, or of its encoder-decoder.
        num_outputs: the outputs of each task's head; of an encoder-decoder, which has no heads, any
            number for each task.
        method: what each task adds.
        dtype: dtype of the computation.
        remat: see the models.
    """
    if isinstance(architecture, BartConfig):
        return Seq2SeqModel(architecture, len(num_outputs), method, dtype, remat)
    return MultiTaskModel(architecture, tuple(num_outputs), method, dtype, remat)


def num_tasks(model: Model) -> int:
    """T, the number of tasks of a model."""
    return len(model.num_outputs) if isinstance(model, MultiTaskModel) else model.num_tasks


def architecture_of(saved: Mapping[str, Any]) -> Architecture:
    """The inverse of `dataclasses.asdict`."""
    if saved.get("model_type") in MODEL_TYPES:
        return BartConfig(**saved)
    return BertConfig(**saved)
