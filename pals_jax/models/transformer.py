"""Transformer layers in Flax linen, post-LN or pre-LN, with named sites for adapters.

BERT, and the encoder and the decoder of BART, mBART and Marian are stacks of these layers. A layer
offers the sites listed in `SITES` and knows no adapter by name: at each of them it hands over the
state that may be changed and the input of the block around it, and goes on with what it gets back.
Attention and feed-forward blocks are modules of their own, without residual connection or layer
norm, so that other arrangements of them can be built.

Causal attention and cross attention are the same function as self-attention, with other masks.

Dimension letters: see `pals_jax.models.layers`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from pals_jax.models.attention import dot_product_attention, merge_heads, split_heads
from pals_jax.models.dropout import dropout
from pals_jax.models.layers import ACTIVATIONS, gradient_materialised, layer_norm, materialised
from pals_jax.models.segments import Places, Segments


class Site(NamedTuple):
    """A place where a state may be changed: the sizes of the state and of its block's input."""

    state: str  # "D" or "F"
    block_input: str
    meaning: str


# Sites of an attention exist once more for the cross attention of a decoder's layers, where keys
# and values are projections of the encoder's output; these are named "cross_attention.query" etc.
SITES = {
    "embeddings": Site("D", "D", "the embeddings; themselves"),
    "attention.query": Site("D", "D", "the projected queries; the block's input"),
    "attention.key": Site("D", "D", "the projected keys; the block's input"),
    "attention.value": Site("D", "D", "the projected values; the block's input"),
    "attention.heads": Site("D", "D", "what the heads give, side by side; the block's input"),
    "attention.projection": Site("D", "D", "their output projection; what the heads give"),
    "attention.output": Site("D", "D", "what attention adds to its residual; the residual"),
    "ffn.intermediate": Site("F", "D", "the expansion before its activation; the block's input"),
    "ffn.hidden": Site("F", "D", "the expansion after its activation; the block's input"),
    "ffn.projection": Site("D", "F", "the projection back; the activated expansion"),
    "ffn.output": Site("D", "D", "what the block adds to its residual; the residual"),
    "layer": Site("D", "D", "the sum before the layer's last layer norm; the layer's input"),
    "layer.output": Site("D", "D", "the layer's output; the layer's input"),
    "top": Site("D", "D", "the last hidden states; themselves"),
    "pooled": Site("D", "D", "what an encoder's pooler returns; the text's first hidden state"),
}


class Sites(Protocol):
    """What a layer asks at each site: its adapters, or nothing."""

    def __call__(
        self,
        site: str,
        state: Array,
        block_input: Array,
        *,
        normalise: Callable[[Array], Array] | None = None,
        query: Array | None = None,
        log_normaliser: Array | None = None,
        to_query: Callable[[Array], Array] | None = None,
        segments: Segments | None = None,
    ) -> Array:
        """Returns the changed state, of the shape and dtype of `state`.

        Args:
            site: a key of `SITES`, or one of those of a cross attention.
            state: what may be changed, [B, L, D or F].
            block_input: the input of its block, [B, L, D or F]. In a pre-LN layer it is behind the
                layer norm at the sites within a block, and before it at "output" sites.
            normalise: at an "output" site, the layer norm of a state's sum with its residual; in a
                pre-LN layer the sum.
            query: at "attention.heads", the queries [B, H, L, K].
            log_normaliser: there, the logarithm of each softmax's denominator, [B, H, L].
            to_query: there, the projection of the block's inputs [B, L, D] to queries.
            segments: of the state's positions, where these are not the layer's own.
        """


def no_sites(site: str, state: Array, block_input: Array, **_: Any) -> Array:
    """A layer without adapters."""
    del site, block_input
    return state


class StackConfig(Protocol):
    """What the layers of one stack are made of, under the names of BERT's `config.json`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def hidden_dropout_prob(self) -> float: ...
    @property
    def attention_probs_dropout_prob(self) -> float: ...
    @property
    def activation_dropout_prob(self) -> float: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def pre_norm(self) -> bool:
        """Whether a block reads LN(h), as in mBART, or its sum with h is normalised."""


class LayerNorm(nn.Module):
    """The layer norm of a stack, computed in float32.

    Attributes:
        epsilon: what is added to the variance.
        dtype: of its result.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, self.epsilon, self.dtype)


def norm_of(config: StackConfig, dtype: Any, name: str | None = None) -> LayerNorm:
    """A layer norm of a stack; within `setup`, without a name."""
    return LayerNorm(config.layer_norm_eps, dtype, name=name)


class Block(nn.Module):
    """What the blocks of a layer have in common: sizes, compute dtype, BERT's initial values."""

    config: Any  # a StackConfig
    dtype: Any = jnp.float32

    def dense(self, features: int, name: str | None = None) -> nn.Dense:
        """A projection; within `setup`, without a name."""
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

    def norm(self, name: str) -> LayerNorm:
        return norm_of(self.config, self.dtype, name)

    def table(self, rows: int, name: str) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(rows, self.config.hidden_size, embedding_init=init, name=name)

    def dropout(self, x: Array, rate: float, places: Places) -> Array:
        return dropout(x, rate, self.dropout_key(), places) if rate else x

    def dropout_key(self) -> Array | None:
        """A new key where the caller passed rngs={"dropout": key}; else dropout is off."""
        return self.make_rng("dropout") if self.has_rng("dropout") else None


class Source(NamedTuple):
    """What the cross attention of a decoder's layers reads.

    Attributes:
        hidden: [B, J, D]; the last hidden states of the encoder. None: `keys_and_values` is given.
        segments: of their J positions.
        attention: of the attention of the decoder's positions to them; see `cross_segments`.
        keys_and_values: [B, H, J, K] both; what `Layer.read_source` has computed of `hidden`, for
            one layer.
    """

    hidden: Array | None
    segments: Segments
    attention: Segments
    keys_and_values: tuple[Array, Array] | None = None


class Attention(Block):
    """Multi-head attention and its output projection; its name begins those of its sites."""

    def setup(self) -> None:
        size = self.config.hidden_size
        self.query, self.key, self.value = (self.dense(size) for _ in range(3))
        self.output = self.dense(size)

    def __call__(
        self,
        x: Array,
        segments: Segments,
        sites: Sites = no_sites,
        source: Source | None = None,
    ) -> Array:
        """x: [B, L, D] -> [B, L, D]; keys and values are of `source`, or of x."""
        config, name = self.config, self.name
        of_attention = segments if source is None else source.attention
        query = self._split(sites(f"{name}.query", materialised(self.query(x)), x))
        if source is None:
            key, value = self._keys_and_values(x, sites)
        else:
            key, value = source.keys_and_values or self.read(source, sites)
        heads, log_normaliser = dot_product_attention(
            query,
            key,
            value,
            of_attention,
            dropout_rate=config.attention_probs_dropout_prob,
            dropout_key=self.dropout_key(),
        )
        z = merge_heads(heads)
        z = sites(
            f"{name}.heads",
            *(z, x),
            query=query,
            log_normaliser=log_normaliser,
            to_query=lambda x: self._split(self.query(x)),
        )
        y = sites(f"{name}.projection", self.output(z), z)
        return self.dropout(y, config.hidden_dropout_prob, segments.places)

    def read(self, source: Source, sites: Sites) -> tuple[Array, Array]:
        """The keys and values of a source, [B, H, J, K] both."""
        assert source.hidden is not None
        return self._keys_and_values(source.hidden, partial(sites, segments=source.segments))

    def _keys_and_values(self, x: Array, sites: Sites) -> tuple[Array, Array]:
        key = self._split(sites(f"{self.name}.key", materialised(self.key(x)), x))
        return key, self._split(sites(f"{self.name}.value", materialised(self.value(x)), x))

    def _split(self, x: Array) -> Array:
        return split_heads(x, self.config.num_attention_heads)


class FeedForward(Block):
    """Expansion, activation, projection."""

    @nn.compact
    def __call__(self, x: Array, segments: Segments, sites: Sites = no_sites) -> Array:
        """x: [B, L, D] -> [B, L, D]."""
        config, places = self.config, segments.places
        z = self.dense(config.intermediate_size, "intermediate")(materialised(x))
        z = sites("ffn.intermediate", gradient_materialised(z), x)
        z = ACTIVATIONS[config.hidden_act](z)
        z = sites("ffn.hidden", z, x)
        z = self.dropout(z, config.activation_dropout_prob, places)
        y = gradient_materialised(self.dense(config.hidden_size, "output")(z))
        y = sites("ffn.projection", y, z)
        return self.dropout(y, config.hidden_dropout_prob, places)


class Layer(Block):
    """One layer: a = LN(h + MH(h)); h' = LN(a + FFN(a)), or pre-LN, open at its sites.

    With a source, cross attention to it comes between the two blocks.
    """

    def setup(self) -> None:
        block = {"config": self.config, "dtype": self.dtype}
        self.attention, self.cross_attention = Attention(**block), Attention(**block)
        self.ffn = FeedForward(**block)

    @nn.compact
    def __call__(
        self,
        h: Array,
        segments: Segments,
        sites: Sites = no_sites,
        source: Source | None = None,
    ) -> Array:
        """h: [B, L, D] -> [B, L, D]."""
        a = self.residual("attention", h, lambda x: self.attention(x, segments, sites), sites)
        if source is not None:
            attend = partial(self.cross_attention, segments=segments, sites=sites, source=source)
            a = self.residual("cross_attention", a, attend, sites)
        whole = lambda y: sites("layer", y, h)  # noqa: E731
        y = self.residual("ffn", a, lambda x: self.ffn(x, segments, sites), sites, whole)
        return sites("layer.output", y, h)

    def read_source(self, source: Source, sites: Sites = no_sites) -> tuple[Array, Array]:
        """The keys and values of its cross attention, [B, H, J, K] both."""
        return self.cross_attention.read(source, sites)

    def residual(
        self,
        name: str,
        h: Array,
        block: Callable[[Array], Array],
        sites: Sites,
        change_sum: Callable[[Array], Array] = lambda y: y,
    ) -> Array:
        """LN(h + block(h)) or, pre-LN, h + block(LN(h)); `change_sum` of the sum in either."""
        norm = self.norm(f"{name}_norm")
        before, behind = (norm, _identity) if self.config.pre_norm else (_identity, norm)
        y = block(before(h))
        y = sites(f"{name}.output", y, h, normalise=lambda y: behind(h + y))
        return behind(change_sum(h + y))


def _identity(x: Array) -> Array:
    return x
