"""The stack of BERT layers: one set of stacked parameters, scanned in spans.

Compile time must not grow with depth, so the layers' parameters are stacked on a leading axis N
and a `lax.scan` walks over them. Adapters may sit on some layers only; consecutive layers that
carry the same adapters form a span, and each span is one scan. With adapters on every layer, on
the first or on the final half there are one or two spans.

Dimension letters: see `pals_jax.models.layers`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.spec import TaskCopy
from pals_jax.models.bert import BertConfig, BertLayer, Embeddings, Pooler
from pals_jax.models.segments import Places, Segments, make_segments, one_position


class Encoder(nn.Module):
    """Embeddings, N layers and the pooler; the whole of the `params` collection.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; parameters, layer norm statistics and softmax are float32.
        remat: recompute each whole layer in the backward pass, matrix products included.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config, self.dtype)
        self.layers = given_or(self, "layers", self._init_layers)
        self.pooler = Pooler(self.config, self.dtype)

    def _init_layers(self, key: Array) -> dict[str, Any]:
        """Parameters of N independent layers, each leaf with a leading axis N."""
        h = jnp.zeros((1, 1, self.config.hidden_size), self.dtype)
        keys = jax.random.split(key, self.config.num_hidden_layers)
        return jax.vmap(lambda key: self._layer().init(key, h, one_position())["params"])(keys)

    def _layer(self) -> BertLayer:
        # Without a parent: the scan applies it to one slice of `layers` at a time.
        return BertLayer(self.config, self.dtype, parent=None)

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
        length, depth = input_ids.shape[1], self.config.num_hidden_layers
        segments = make_segments(attention_mask, first, salts)
        keys: Any = (None, None, None)
        if self.has_rng("dropout"):
            below, key, above = jax.random.split(self.make_rng("dropout"), 3)
            keys = below, jax.random.split(key, depth), above
        begin = 0
        if hidden is None:
            h = self.embeddings(input_ids, token_type_ids, segments)
            h = adapters.sites(segments, keys[0])("embeddings", h, h)
        else:
            h, begin = hidden, layers_below(adapters)
        # Prompts are positions that an adapter at the embeddings has added at the end of a row.
        prompts = (h.shape[1] - length) // first.shape[1]
        longer = make_segments(attention_mask, first, salts, prompts)
        for start, stop in adapters.spans():
            if start >= begin:
                h = self._scan(h, longer, keys[1], adapters, start, stop)
        h = h[:, :length]
        return adapters.sites(segments, keys[2])("top", h, h)

    def _scan(
        self,
        h: Array,
        segments: Segments,
        keys: Array | None,
        adapters: TaskAdapters,
        start: int,
        stop: int,
    ) -> Array:
        """Applies the layers start to stop - 1, which all carry the same adapters."""

        def body(h: Any, layer: Any) -> tuple[Any, None]:
            params, adapter_params, key, active = layer
            rngs = {} if key is None else {"dropout": key}
            sites = adapters.sites(segments, key, adapter_params, active)
            h = self._layer().apply({"params": params}, h, segments, sites, rngs=rngs)
            return h, None

        # Save only matmul outputs; recomputing the rest is cheaper than storing it. With remat,
        # save nothing.
        kept = None if self.remat else jax.checkpoint_policies.dots_saveable
        body = jax.checkpoint(body, policy=kept, prevent_cse=False)
        params, keys, active = jax.tree.map(
            lambda x: x[start:stop], (self.layers, keys, adapters.active)
        )
        params = adapters.own_layers(params, start, stop)
        h, _ = jax.lax.scan(body, h, (params, adapters.layers(start, stop), keys, active))
        return h

    def pool(self, h: Array, first: Array, salts: Array | None = None) -> Array:
        """[B, L, D] -> [B, M, D]: BERT's pooler on the examples' first positions."""
        h = jnp.take_along_axis(h, first[..., None], axis=1)
        return self.pooler(h, Places.of_examples(salts, h))

    def everything(self) -> Array:
        """Touches every parameter, for `init`, without a pass through the layers; -> [1, 1, D]."""
        ids = jnp.zeros((1, 1), jnp.int32)
        return self.pool(self.embeddings(ids, ids, one_position()), ids)


def given_or(module: nn.Module, name: str, init: Callable[[Array], Any]) -> Any:
    """The parameters of that name if they are given, else new ones.

    `module.param` alone would trace `init` again to check the shapes of what is given, which takes
    a third of all tracing where `init` is a whole stack of layers.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init)


def layers_below(adapters: TaskAdapters) -> int:
    """The number of layers below the first one that a task changes: they are shared by all tasks.

    0 if a task changes the embeddings or the first layer; N if tasks change nothing below the top.
    """
    return min(lowest_layers(adapters).values(), default=adapters.config.num_hidden_layers)


def lowest_layers(adapters: TaskAdapters) -> dict[str, int]:
    """The lowest layer that each part of a method changes; 0 and N as in `layers_below`."""
    depth = adapters.config.num_hidden_layers
    lowest = {}
    for spec in adapters.method:
        indices = spec.layer_indices(depth)
        if isinstance(spec, TaskCopy):
            mine = adapters.adapter_params[spec.name]
            changes_embeddings, indices = "embeddings" in mine, indices if "layers" in mine else ()
        else:
            changes_embeddings = spec.site == "embeddings"
        lowest[spec.name] = 0 if changes_embeddings else min(indices, default=depth)
    return lowest
