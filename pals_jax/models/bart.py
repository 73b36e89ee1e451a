"""BART, mBART and Marian: their architecture and their embeddings.

The three differ in little. BART (Lewis et al. 2020) is post-LN. mBART (Liu et al. 2020) is pre-LN,
with a layer norm above the last layer, and scales its word embeddings by sqrt(D). Marian
(Junczys-Dowmunt et al. 2018) is post-LN, with sinusoidal positions, and does not normalise the
embeddings. Their layers are those of `pals_jax.models.transformer`.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.models.layers import ACTIVATIONS
from pals_jax.models.transformer import Block, Sites
from pals_jax.runtime.errors import UserError

MODEL_TYPES = ("bart", "mbart", "marian")
_OFFSET = 2  # rows of BART's and mBART's position tables before that of position 0


@dataclasses.dataclass(frozen=True)
class BartStack:
    """The encoder or the decoder of such a model: a `transformer.StackConfig`, and positions."""

    model_type: str
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    activation_dropout_prob: float
    initializer_range: float
    layer_norm_eps: float = 1e-5

    @property
    def pre_norm(self) -> bool:
        """Whether a block reads LN(h), and a layer norm follows the last layer."""
        return self.model_type == "mbart"


@dataclasses.dataclass(frozen=True)
class BartConfig:
    """The architecture, under the names of Hugging Face's config.json; by default BART-large."""

    vocab_size: int = 50265
    d_model: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 12
    encoder_attention_heads: int = 16
    decoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_ffn_dim: int = 4096
    max_position_embeddings: int = 1024
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    model_type: str = "bart"  # or another one of `MODEL_TYPES`
    pad_token_id: int = 1
    decoder_start_token_id: int = 2

    def __post_init__(self) -> None:
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, heads):
                raise UserError(
                    f"d_model {self.d_model} is not a multiple of {heads} {getattr(self, heads)};"
                    " correct the model's config.json."
                )
        if self.activation_function not in ACTIVATIONS:
            raise UserError(
                f"activation_function {self.activation_function!r} in the model's config.json is"
                f" not known; known are {', '.join(ACTIVATIONS)}."
            )

    @property
    def max_length(self) -> int:
        """The largest number of tokens that have positions, of a source or a target."""
        return self.max_position_embeddings

    @property
    def stacks(self) -> dict[str, BartStack]:
        """The architecture of the "encoder" and of the "decoder"."""
        return {block: self._stack(block) for block in ("encoder", "decoder")}

    def _stack(self, block: str) -> BartStack:
        return BartStack(
            model_type=self.model_type,
            max_position_embeddings=self.max_position_embeddings,
            hidden_size=self.d_model,
            num_hidden_layers=getattr(self, f"{block}_layers"),
            num_attention_heads=getattr(self, f"{block}_attention_heads"),
            intermediate_size=getattr(self, f"{block}_ffn_dim"),
            hidden_act=self.activation_function,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            activation_dropout_prob=self.activation_dropout,
            initializer_range=self.init_std,
        )

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> "BartConfig":
        """The fields of a Hugging Face `config.json` that describe the architecture."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in fields})


class Vocabulary(nn.Module):
    """One table for the words of source, target and output, and a bias of the logits."""

    config: BartConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        size, init = self.config.vocab_size, nn.initializers.normal(self.config.init_std)
        self.embedding = self.param("embedding", init, (size, self.config.d_model))
        self.logits_bias = self.param("logits_bias", nn.initializers.zeros, (size,))

    def __call__(self, ids: Array) -> Array:
        """int [B, L] -> [B, L, D]: the words, scaled where the architecture does."""
        scale = self.config.d_model**0.5 if self.config.scale_embedding else 1.0
        return self.embedding[ids].astype(self.dtype) * scale

    def logits(self, h: Array) -> Array:
        """[B, L, D] -> float32 [B, L, V]. The bias is not trained, as in the original codes."""
        logits = jnp.einsum("bld,vd->blv", h, self.words(), preferred_element_type=jnp.float32)
        return logits + jax.lax.stop_gradient(self.logits_bias)[None, None]

    def words(self) -> Array:
        """The table of words, [V, D] in `dtype`."""
        return self.embedding.astype(self.dtype)

    def next_logits(self, h: Array, words: Array) -> Array:
        """[B, K, D], [V, D] -> float32 [B, K, V]: as `logits`.

        For few positions the product is faster on a CPU with `words` as the left factor.
        """
        product = jnp.einsum("vd,bld->vbl", words, h, preferred_element_type=jnp.float32)
        logits = jnp.moveaxis(product + self.logits_bias[:, None, None], 0, -1)
        return jax.lax.optimization_barrier(logits)  # or XLA:CPU transposes for each of its readers


class BartEmbeddings(Block):
    """Words + positions and, but for Marian, their layer norm; `config` is a `BartStack`.

    The site "embeddings" is before the layer norm, where He et al. add prompts.
    """

    @nn.compact
    def __call__(self, words: Array, position: Array, sites: Sites) -> Array:
        """words: [B, L, D], position: int [B, L] -> [B, L + added positions, D]."""
        rows = self.config.max_position_embeddings
        if self.config.model_type == "marian":
            table = jnp.asarray(sinusoids(rows, self.config.hidden_size))
            x = words + table[position].astype(self.dtype)
            return sites("embeddings", x, x)
        x = words + self.table(rows + _OFFSET, "position")(position + _OFFSET).astype(self.dtype)
        return self.norm("norm")(sites("embeddings", x, x))


def sinusoids(rows: int, width: int) -> np.ndarray:
    """Marian's positions, float32 [rows, width]: sines in the first half, cosines in the second."""
    frequency = 10000.0 ** (-2.0 * (np.arange(width) // 2) / width)
    angles = np.arange(rows)[:, None] * frequency
    table = np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1)
    return table.astype(np.float32)
