"""BERT's encoder: embeddings, a stack of layers, and the pooler.

Dimension letters: see `pals_jax.models.layers`.
"""

import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.bert import Embeddings, Pooler
from pals_jax.models.segments import Places, make_segments, one_position
from pals_jax.models.stack import Stack, given_or, layers_below


class Encoder(Stack):
    """Embeddings, N layers and the pooler; the whole of the `params` collection.

    `config` is a `BertConfig`.
    """

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config, self.dtype)
        self.layers = given_or(self, "layers", self.init_layers)
        self.pooler = Pooler(self.config, self.dtype)

    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array,
        attention_mask: Array,
        adapters: TaskAdapters,
        first: Array,
        salts: Array | None = None,
        hidden: Array | None = None,
    ) -> Array:
        """The hidden states after the last layer, or what an adapter at the top makes of them.

        Args:
            input_ids: int [B, L].
            token_type_ids: int [B, L].
            attention_mask: int [B, L]; 0 at padding, else the example of its row that a position
                belongs to.
            adapters: the adapters of the rows' task.
            first: int [B, M]; the position at which each example of a row begins.
            salts: uint32 [B, M, 2]; salts of the examples' dropout masks. None: dropout is off.
            hidden: [B, L, D] in `dtype`; the output of the `layers_below` the adapters. The encoder
                then begins above them. None: it begins with the tokens.

        Returns:
            [B, L, D] in `dtype`.
        """
        length = input_ids.shape[1]
        segments = make_segments(attention_mask, first, salts)
        below, keys, above = self.dropout_keys()
        begin = 0
        if hidden is None:
            h = self.embeddings(input_ids, token_type_ids, segments)
            h = adapters.sites(segments, below)("embeddings", h, h)
        else:
            h, begin = hidden, layers_below(adapters)
        # Prompts are positions that an adapter at the embeddings has added at the end of a row.
        prompts = (h.shape[1] - length) // first.shape[1]
        longer = make_segments(attention_mask, first, salts, prompts)
        h = self.through_layers(self.layers, h, longer, keys, adapters, begin=begin)[:, :length]
        return adapters.sites(segments, above)("top", h, h)

    def pool(
        self, h: Array, adapters: TaskAdapters, first: Array, salts: Array | None = None
    ) -> Array:
        """[B, L, D] -> [B, M, D]: BERT's pooler on the examples' first positions.

        Or what an adapter makes of it. Arguments as above.
        """
        h = jnp.take_along_axis(h, first[..., None], axis=1)
        pooled = self.pooler(h, Places.of_examples(salts, h))
        each = jnp.broadcast_to(jnp.arange(first.shape[1]), first.shape)
        return adapters.sites(make_segments(each + 1, each), None)("pooled", pooled, h)

    def everything(self) -> Array:
        """Touches every parameter, for `init`, without a pass through the layers; -> [1, 1, D]."""
        ids = jnp.zeros((1, 1), jnp.int32)
        nothing = TaskAdapters((), {}, self.config)
        return self.pool(self.embeddings(ids, ids, one_position()), nothing, ids)
