"""The stack of BERT layers: one set of stacked parameters, scanned in spans.

Compile time must not grow with depth, so the layers' parameters are stacked on a leading axis N
and a `lax.scan` walks over them. Adapters may sit on some layers only; consecutive layers that
carry the same adapters form a span, and each span is one scan. With adapters on every layer, on
the first or on the final half there are one or two spans.

Dimension letters: see `pals_jax.models.layers`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters import TaskAdapters
from pals_jax.models.bert import BertConfig, BertLayer, Embeddings, Pooler


class Encoder(nn.Module):
    """Embeddings, N layers and the pooler; the whole of the `params` collection.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; parameters, layer norm statistics and softmax are float32.
        remat: recompute each layer's activations in the backward pass instead of keeping them.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config, self.dtype)
        self.layers = self.param("layers", self._init_layers)
        self.pooler = Pooler(self.config, self.dtype)

    def _init_layers(self, key: Array) -> dict[str, Any]:
        """Parameters of N independent layers, each leaf with a leading axis N."""
        h = jnp.zeros((1, 1, self.config.hidden_size), self.dtype)
        mask = jnp.ones((1, 1, 1, 1), bool)
        keys = jax.random.split(key, self.config.num_hidden_layers)
        return jax.vmap(lambda key: self._layer().init(key, h, mask)["params"])(keys)

    def _layer(self) -> BertLayer:
        # Without a parent: the scan applies it to one slice of `layers` at a time.
        return BertLayer(self.config, self.dtype, parent=None)

    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array,
        attention_mask: Array,
        adapters: TaskAdapters,
    ) -> Array:
        """The hidden states after the last layer, or what an adapter at the top makes of them.

        Args:
            input_ids: int [B, L].
            token_type_ids: int [B, L].
            attention_mask: int [B, L]; 0 at padding.
            adapters: those of the rows' task.

        Returns:
            [B, L, D] in `dtype`.
        """
        length, depth = input_ids.shape[1], self.config.num_hidden_layers
        mask = (attention_mask > 0)[:, None, None, :]
        keys: Any = (None, None, None)
        if self.has_rng("dropout"):
            below, key, above = jax.random.split(self.make_rng("dropout"), 3)
            keys = below, jax.random.split(key, depth), above
        h = self.embeddings(input_ids, token_type_ids)
        h = adapters.sites(mask, keys[0])("embeddings", h, h)
        # A site below the layers may have added positions at the end (prompts).
        grown = [(0, 0)] * 3 + [(0, h.shape[1] - length)]
        longer = jnp.pad(mask, grown, constant_values=True)
        for start, stop in adapters.spans():
            h = self._scan(h, longer, keys[1], adapters, start, stop)
        h = h[:, :length]
        return adapters.sites(mask, keys[2])("top", h, h)

    def _scan(
        self,
        h: Array,
        mask: Array,
        keys: Array | None,
        adapters: TaskAdapters,
        start: int,
        stop: int,
    ) -> Array:
        """Layers start to stop - 1, which all carry the same adapters."""

        def body(h: Any, layer: Any) -> tuple[Any, None]:
            params, thetas, key, active = layer
            rngs = {} if key is None else {"dropout": key}
            sites = adapters.sites(mask, key, thetas, active)
            h = self._layer().apply({"params": params}, h, mask, sites, rngs=rngs)
            return h, None

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        params, keys, active = jax.tree.map(
            lambda x: x[start:stop], (self.layers, keys, adapters.active)
        )
        params = adapters.own_layers(params, start, stop)
        h, _ = jax.lax.scan(body, h, (params, adapters.layers(start, stop), keys, active))
        return h

    def pool(self, h: Array) -> Array:
        """[B, L, D] -> [B, D]: BERT's pooler."""
        return self.pooler(h)

    def everything(self, input_ids: Array, adapters: TaskAdapters) -> Array:
        """Touches every parameter, for `init`; input_ids: int [B, L] -> [B, D]."""
        return self.pool(self(input_ids, input_ids, input_ids, adapters))
