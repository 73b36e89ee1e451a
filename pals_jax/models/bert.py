"""BERT in Flax linen: post-LN, scanned over its layers, with named sites for adapters.

The encoder offers the sites listed in `SITES` and knows no adapter by name: at each of them it
hands over the state that may be changed and the input of the block around it, and goes on with
what it gets back. Attention and feed-forward blocks are modules of their own, without residual
connection or layer norm, so that other arrangements of them can be built.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from pals_jax.errors import UserError
from pals_jax.models.layers import (
    ACTIVATIONS,
    dot_product_attention,
    dropout,
    merge_heads,
    split_heads,
)

# name of the site -> (state that may be changed, input of the block that it belongs to)
SITES = {
    "attention.query": "projected queries [B, L, D]; the layer's input",
    "attention.key": "projected keys [B, L, D]; the layer's input",
    "attention.value": "projected values [B, L, D]; the layer's input",
    "attention.output": "what the attention block adds to its residual; the layer's input",
    "ffn.output": "what the feed-forward block adds to its residual; that block's input",
    "layer": "the sum before the layer's last layer norm; the layer's input",
}


class Sites(Protocol):
    """What the encoder asks at each site: the adapters of one layer, or nothing."""

    def __call__(self, site: str, state: Array, block_input: Array) -> Array:
        """Returns the changed state, of the shape and dtype of `state`."""


def no_sites(site: str, state: Array, block_input: Array) -> Array:
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


class _Block(nn.Module):
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

    def dropout(self, x: Array, rate: float) -> Array:
        return dropout(x, rate, self.dropout_key())

    def dropout_key(self) -> Array | None:
        """A new key where the caller passed rngs={"dropout": key}; else dropout is off."""
        return self.make_rng("dropout") if self.has_rng("dropout") else None


class Embeddings(_Block):
    """Words + positions + token types, layer norm, dropout."""

    @nn.compact
    def __call__(self, input_ids: Array, token_type_ids: Array) -> Array:
        """input_ids, token_type_ids: int [B, L] -> [B, L, D]."""
        config = self.config
        positions = jnp.arange(input_ids.shape[1])[None]
        x = (
            self.table(config.vocab_size, "word")(input_ids)
            + self.table(config.max_position_embeddings, "position")(positions)
            + self.table(config.type_vocab_size, "token_type")(token_type_ids)
        )
        x = self.norm("norm")(x)
        return self.dropout(x, config.hidden_dropout_prob)

    def table(self, rows: int, name: str) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(rows, self.config.hidden_size, embedding_init=init, name=name)


class Attention(_Block):
    """Multi-head self-attention and its output projection."""

    @nn.compact
    def __call__(self, x: Array, mask: Array, sites: Sites) -> Array:
        """x: [B, L, D]; mask: bool [B, 1, 1 or L, L] -> [B, L, D]."""
        config = self.config
        query, key, value = (
            split_heads(
                sites(f"attention.{name}", self.dense(config.hidden_size, name)(x), x),
                config.num_attention_heads,
            )
            for name in ("query", "key", "value")
        )
        heads = dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout_rate=config.attention_probs_dropout_prob,
            dropout_key=self.dropout_key(),
        )
        y = self.dense(config.hidden_size, "output")(merge_heads(heads))
        y = self.dropout(y, config.hidden_dropout_prob)
        return sites("attention.output", y, x)


class FeedForward(_Block):
    """Expansion, activation, projection."""

    @nn.compact
    def __call__(self, x: Array, sites: Sites) -> Array:
        """x: [B, L, D] -> [B, L, D]."""
        config = self.config
        y = ACTIVATIONS[config.hidden_act](self.dense(config.intermediate_size, "intermediate")(x))
        y = self.dense(config.hidden_size, "output")(y)
        y = self.dropout(y, config.hidden_dropout_prob)
        return sites("ffn.output", y, x)


class BertLayer(_Block):
    """One post-LN layer: a = LN(h + MH(h)); h' = LN(a + FFN(a)), open at its sites."""

    @nn.compact
    def __call__(self, h: Array, mask: Array, sites: Sites = no_sites) -> Array:
        """h: [B, L, D]; mask: bool [B, 1, 1 or L, L] -> [B, L, D]."""
        block = {"config": self.config, "dtype": self.dtype}
        a = h + Attention(**block, name="attention")(h, mask, sites)
        a = self.norm("attention_norm")(a)
        y = a + FeedForward(**block, name="ffn")(a, sites)
        return self.norm("ffn_norm")(sites("layer", y, h))


class Pooler(_Block):
    """tanh of a projection of the first position."""

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """h: [B, L, D] -> [B, D]."""
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(h[:, 0]))
