"""BERT and RoBERTa in Flax linen: post-LN, scanned over its layers, with named sites for adapters.

The encoder offers the sites listed in `SITES` and knows no adapter by name: at each of them it
hands over the state that may be changed and the input of the block around it, and goes on with
what it gets back. Attention and feed-forward blocks are modules of their own, without residual
connection or layer norm, so that other arrangements of them can be built.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from pals_jax.models.layers import (
    ACTIVATIONS,
    dot_product_attention,
    dropout,
    merge_heads,
    split_heads,
)
from pals_jax.models.segments import Places, Segments
from pals_jax.runtime.errors import UserError


class Site(NamedTuple):
    """A place where a state may be changed: the sizes of the state and of its block's input."""

    state: str  # "D" or "F"
    block_input: str
    meaning: str


SITES = {
    "embeddings": Site("D", "D", "the embeddings; themselves"),
    "attention.query": Site("D", "D", "the projected queries; the layer's input"),
    "attention.key": Site("D", "D", "the projected keys; the layer's input"),
    "attention.value": Site("D", "D", "the projected values; the layer's input"),
    "attention.heads": Site("D", "D", "what the heads give, side by side; the layer's input"),
    "attention.projection": Site("D", "D", "their output projection; what the heads give"),
    "attention.output": Site("D", "D", "what attention adds to its residual; the layer's input"),
    "ffn.intermediate": Site("F", "D", "the expansion before its activation; the block's input"),
    "ffn.hidden": Site("F", "D", "the expansion after its activation; the block's input"),
    "ffn.projection": Site("D", "F", "the projection back; the activated expansion"),
    "ffn.output": Site("D", "D", "what the block adds to its residual; the block's input"),
    "layer": Site("D", "D", "the sum before the layer's last layer norm; the layer's input"),
    "layer.output": Site("D", "D", "the layer's output; the layer's input"),
    "top": Site("D", "D", "the last hidden states; themselves"),
}


class Sites(Protocol):
    """What the encoder asks at each site: the adapters of one layer, or nothing."""

    def __call__(
        self,
        site: str,
        state: Array,
        block_input: Array,
        *,
        normalise: Callable[[Array], Array] | None = None,
        query: Array | None = None,
        log_normaliser: Array | None = None,
    ) -> Array:
        """Returns the changed state, of the shape and dtype of `state`.

        Args:
            site: a key of `SITES`.
            state: what may be changed, [B, L, D or F].
            block_input: the input of its block, [B, L, D or F].
            normalise: at an "output" site, the layer norm of a state's sum with its residual.
            query: at "attention.heads", the queries [B, H, L, K].
            log_normaliser: there, the logarithm of each softmax's denominator, [B, H, L].
        """


def no_sites(site: str, state: Array, block_input: Array, **_: Any) -> Array:
    """A layer without adapters."""
    del site, block_input
    return state


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

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> "BertConfig":
        """The fields of a Hugging Face `config.json` that describe the architecture."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in fields})


class Block(nn.Module):
    """What the blocks of a layer have in common: sizes, compute dtype, BERT's initial values."""

    config: BertConfig
    dtype: Any = jnp.float32

    def dense(self, features: int, name: str) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

    def norm(self, name: str) -> nn.LayerNorm:
        # The fast variance E[x^2] - E[x]^2 loses digits that parity with PyTorch needs.
        epsilon = self.config.layer_norm_eps
        return nn.LayerNorm(epsilon, dtype=self.dtype, use_fast_variance=False, name=name)

    def dropout(self, x: Array, rate: float, places: Places) -> Array:
        return dropout(x, rate, self.dropout_key(), places)

    def dropout_key(self) -> Array | None:
        """A new key where the caller passed rngs={"dropout": key}; else dropout is off."""
        return self.make_rng("dropout") if self.has_rng("dropout") else None


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

    def table(self, rows: int, name: str) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(rows, self.config.hidden_size, embedding_init=init, name=name)


class Attention(Block):
    """Multi-head self-attention and its output projection."""

    @nn.compact
    def __call__(self, x: Array, segments: Segments, sites: Sites = no_sites) -> Array:
        """x: [B, L, D] -> [B, L, D]."""
        config = self.config
        query, key, value = (
            split_heads(
                sites(f"attention.{name}", self.dense(config.hidden_size, name)(x), x),
                config.num_attention_heads,
            )
            for name in ("query", "key", "value")
        )
        heads, log_normaliser = dot_product_attention(
            query,
            key,
            value,
            segments,
            dropout_rate=config.attention_probs_dropout_prob,
            dropout_key=self.dropout_key(),
        )
        z = merge_heads(heads)
        z = sites("attention.heads", z, x, query=query, log_normaliser=log_normaliser)
        y = sites("attention.projection", self.dense(config.hidden_size, "output")(z), z)
        return self.dropout(y, config.hidden_dropout_prob, segments.places)


class FeedForward(Block):
    """Expansion, activation, projection."""

    @nn.compact
    def __call__(self, x: Array, segments: Segments, sites: Sites = no_sites) -> Array:
        """x: [B, L, D] -> [B, L, D]."""
        config = self.config
        z = self.dense(config.intermediate_size, "intermediate")(x)
        z = ACTIVATIONS[config.hidden_act](sites("ffn.intermediate", z, x))
        z = sites("ffn.hidden", z, x)
        y = sites("ffn.projection", self.dense(config.hidden_size, "output")(z), z)
        return self.dropout(y, config.hidden_dropout_prob, segments.places)


class BertLayer(Block):
    """One post-LN layer: a = LN(h + MH(h)); h' = LN(a + FFN(a)), open at its sites."""

    @nn.compact
    def __call__(self, h: Array, segments: Segments, sites: Sites = no_sites) -> Array:
        """h: [B, L, D] -> [B, L, D]."""
        block = {"config": self.config, "dtype": self.dtype}
        attention_norm, ffn_norm = self.norm("attention_norm"), self.norm("ffn_norm")
        y = Attention(**block, name="attention")(h, segments, sites)
        y = sites("attention.output", y, h, normalise=lambda y: attention_norm(h + y))
        a = attention_norm(h + y)
        y = FeedForward(**block, name="ffn")(a, segments, sites)
        y = sites("ffn.output", y, a, normalise=lambda y: ffn_norm(a + y))
        return sites("layer.output", ffn_norm(sites("layer", a + y, h)), h)


class Pooler(Block):
    """tanh of a projection of each example's first position."""

    @nn.compact
    def __call__(self, first: Array, places: Places) -> Array:
        """first: [B, M, D] -> [B, M, D]; the places are those of the examples."""
        if self.config.model_type == "roberta":  # whose classification head drops its input too
            first = self.dropout(first, self.config.hidden_dropout_prob, places)
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(first))
