"""The encoder and the decoder of BART, mBART and Marian, as two stacks of the same layers.

Dimension letters: see `pals_jax.models.layers`.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.forms import Params
from pals_jax.models.bart import BartConfig, BartEmbeddings, BartStack, Vocabulary
from pals_jax.models.dropout import dropout
from pals_jax.models.segments import Segments, cross_segments, make_segments, one_position
from pals_jax.models.stack import Stack, given_or, layers_below
from pals_jax.models.transformer import Source, no_sites, norm_of

# Of each layer of a decoder, the keys and values of a source, [B, H, J, K] both.
KeysAndValues: TypeAlias = tuple[tuple[Array, Array], ...]
# Of the cache: those of each layer, and those of what is above all layers.
Entries: TypeAlias = tuple[tuple[Any, ...], Any]

PARTS = ("encoder", "decoder", "vocabulary")  # of the `params` collection


class TextStack(Stack):
    """Embeddings, N layers and, of mBART, a layer norm; `config` is a `BartStack`.

    Attributes:
        decoder: whether it is a decoder, with causal attention and attention to a source.
    """

    decoder: bool = False

    def setup(self) -> None:
        self.embeddings = BartEmbeddings(self.config, self.dtype)
        self.layers = given_or(self, "layers", self._init_layers)
        if self.config.pre_norm:
            self.norm = norm_of(self.config, self.dtype)

    def _init_layers(self, key: Array) -> dict[str, Any]:
        one = one_position()
        h = jnp.zeros((1, 1, self.config.hidden_size), self.dtype)
        return self.init_layers(key, Source(h, one, one) if self.decoder else None)

    def __call__(
        self,
        words: Array,
        segment_ids: Array,
        adapters: TaskAdapters,
        first: Array,
        salts: Array | None = None,
        source: tuple[Array, Segments] | None = None,
        hidden: Array | None = None,
    ) -> tuple[Array, Segments]:
        """The hidden states after the last layer, or what an adapter at the top makes of them.

        Args:
            words: [B, L, D] in `dtype`; the embeddings of the tokens.
            segment_ids: int [B, L]; 0 at padding, else the example of its row that a position
                belongs to.
            adapters: the adapters of the rows' task.
            first: int [B, M]; the position at which each example of a row begins.
            salts: uint32 [B, M, 2]; salts of the examples' dropout masks. None: dropout is off.
            source: of a decoder, what its encoder returned.
            hidden: [B, L, D] in `dtype`; the output of the `layers_below` the adapters. The stack
                then begins above them. None: it begins with the words.

        Returns:
            [B, L + P, D] in `dtype`, with the P positions of prompts at the end, and the segments
            of these positions.
        """
        segments = make_segments(segment_ids, first, salts, causal=self.decoder)
        below, keys, above = self.dropout_keys()
        if hidden is None:
            begin, sites = 0, adapters.sites(segments, below)
            h = self.embeddings(words, segments.places.position, sites)
            # Prompts are positions that an adapter at the embeddings has added.
            if prompts := (h.shape[1] - words.shape[1]) // first.shape[1]:
                segments = make_segments(segment_ids, first, salts, prompts)
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            h = dropout(h, self.config.hidden_dropout_prob, key, segments.places)
        else:
            begin, h = layers_below(adapters), hidden
        read = None
        if source is not None:
            read = Source(*source, cross_segments(segments, source[1]))
        h = self.through_layers(self.layers, h, segments, keys, adapters, read, begin)
        h = self.norm(h) if self.config.pre_norm else h
        return adapters.sites(segments, above)("top", h, h), segments

    def read_source(
        self, layers: tuple[Any, ...], hidden: Array, segments: Segments, adapters: TaskAdapters
    ) -> KeysAndValues:
        """Of a decoder, the keys and values of the cross attention of each layer, [B, H, J, K].

        Args:
            layers: the parameters of each layer; see `stack.unstacked`.
            hidden: [B, J, D] in `dtype`; what the encoder returned, with
            segments: of its J positions.
            adapters: the adapters of the rows' task.
        """
        return self.read_through_layers(layers, Source(hidden, segments, segments), adapters)

    def step(
        self,
        layers: tuple[Any, ...],
        words: Array,
        segments: Segments,
        adapters: TaskAdapters,
        read: tuple[KeysAndValues, Segments],
        entries: Entries | None,
    ) -> tuple[Array, Entries]:
        """Of a decoder, the last hidden states [B, L, D] of L variants of one position of a text.

        Args:
            layers: the parameters of each layer; see `stack.unstacked`.
            words: [B, L, D] in `dtype`; the embeddings of the tokens.
            segments: of the variants; see `next_position`.
            adapters: the adapters of the rows' task.
            read: the keys and values of the source, and the segments of its positions.
            entries: of the cache. None: all are zero.

        Returns:
            The hidden states, and what the attentions have left in the cache.
        """
        keys_and_values, of_source = read
        attention = cross_segments(segments, of_source)
        sources = tuple(Source(None, of_source, attention, own) for own in keys_and_values)
        h = self.embeddings(words, segments.places.position, adapters.sites(segments, None))
        before, above = (None, None) if entries is None else entries
        h, left = self.step_through_layers(layers, h, segments, adapters, sources, before)
        h = self.norm(h) if self.config.pre_norm else h
        segments = segments.inner(above)
        h = adapters.sites(segments, None)("top", h, h)
        return h, (left, segments.left)

    def lower(self, words: Array, segment_ids: Array, first: Array) -> Array:
        """What the embeddings and all layers make of the words, [B, L, D], arguments as above.

        Without adapters and dropout, and before the layer norm that follows the last layer of
        mBART: the `hidden` of a stack with more layers above.
        """
        segments = make_segments(segment_ids, first)
        h = self.embeddings(words, segments.places.position, no_sites)
        bare = TaskAdapters((), {}, self.config)
        return self.through_layers(self.layers, h, segments, None, bare)


def init_params(config: BartConfig, part: str, key: Array) -> Params:
    """Random parameters of one of the `PARTS` of a model."""
    ids = jnp.ones((1, 1), jnp.int32)
    if part == "vocabulary":
        return Vocabulary(config, parent=None).init(key, ids)["params"]
    stack: BartStack = config.stacks[part]
    words, first = jnp.zeros((1, 1, config.d_model)), jnp.zeros((1, 1), jnp.int32)
    source = (words, one_position()) if part == "decoder" else None
    module = TextStack(stack, decoder=source is not None, parent=None)
    bare = TaskAdapters((), {}, stack, block=part)
    return module.init(key, words, ids, bare, first, source=source)["params"]
