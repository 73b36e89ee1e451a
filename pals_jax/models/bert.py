"""BERT and RoBERTa: their architecture, their embeddings and their pooler.

Their layers are those of `pals_jax.models.transformer`. Dimension letters: see
`pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from pals_jax.models.layers import ACTIVATIONS
from pals_jax.models.segments import Places, Segments
from pals_jax.models.transformer import Block
from pals_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The architecture, under the names of Hugging Face's config.json."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    model_type: str = "bert"  # or roberta, which counts positions from pad_token_id + 1

    activation_dropout_prob: ClassVar[float] = 0.0
    pre_norm: ClassVar[bool] = False

    @property
    def max_length(self) -> int:
        """The largest number of tokens that have positions."""
        first = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - first

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads"
                f" {self.num_attention_heads}; correct the encoder's config.json."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"hidden_act {self.hidden_act!r} in the encoder's config.json is not known;"
                f" known are {', '.join(ACTIVATIONS)}."
            )

    @property
    def stacks(self) -> dict[str, "BertConfig"]:
        """The architecture of the one stack of layers, the "encoder"."""
        return {"encoder": self}

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> "BertConfig":
        """The fields of a Hugging Face `config.json` that describe the architecture."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in fields})


class Embeddings(Block):
    """Words + positions + token types, layer norm, dropout."""

    @nn.compact
    def __call__(self, input_ids: Array, token_type_ids: Array, segments: Segments) -> Array:
        """input_ids, token_type_ids: int [B, L] -> [B, L, D]."""
        config = self.config
        position = self.position_ids(input_ids, segments.places.position)
        x = (
            self.table(config.vocab_size, "word")(input_ids)
            + self.table(config.max_position_embeddings, "position")(position)
            + self.table(config.type_vocab_size, "token_type")(token_type_ids)
        )
        x = self.norm("norm")(x)
        return self.dropout(x, config.hidden_dropout_prob, segments.places)

    def position_ids(self, input_ids: Array, position: Array) -> Array:
        """int [B, L]: from 0; RoBERTa's count real tokens, from behind the padding's own."""
        if self.config.model_type == "bert":
            return position
        pad = self.config.pad_token_id
        real = (input_ids != pad).astype(jnp.int32)
        count = jnp.cumsum(real, axis=1)
        first = jnp.arange(input_ids.shape[1])[None] - position
        before = jnp.take_along_axis(count - real, first, axis=1)  # in the examples before
        return (count - before) * real + pad


class Pooler(Block):
    """tanh of a projection of each example's first position."""

    @nn.compact
    def __call__(self, first: Array, places: Places) -> Array:
        """first: [B, M, D] -> [B, M, D]; the places are those of the examples."""
        if self.config.model_type == "roberta":  # whose classification head drops its input too
            first = self.dropout(first, self.config.hidden_dropout_prob, places)
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(first))
