"""Forms made of the encoder's own blocks, for the top of the encoder.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters.forms import (
    BERT_INIT,
    Context,
    Param,
    Params,
    check_size,
    dense,
    project,
)
from pals_jax.models.segments import Segments, one_position
from pals_jax.models.transformer import Attention, Block, FeedForward, Layer, StackConfig
from pals_jax.runtime.errors import UserError

_INITS = {
    "kernel": BERT_INIT,
    "bias": jax.nn.initializers.zeros,
    "scale": jax.nn.initializers.ones,
}


class _AttentionBlock(Block):
    """LN(x + MH(x))."""

    @nn.compact
    def __call__(self, x: Array, segments: Segments) -> Array:
        y = Attention(self.config, self.dtype, name="attention")(x, segments)
        return self.norm("norm")(x + y)


class _FeedForwardBlock(Block):
    """LN(x + FFN(x))."""

    @nn.compact
    def __call__(self, x: Array, segments: Segments) -> Array:
        y = FeedForward(self.config, self.dtype, name="ffn")(x, segments)
        return self.norm("norm")(x + y)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """`count` blocks in the encoder's own size, or, with `size`, between projections V_E and V_D.

    Attributes:
        kind: "attention" or "ffn", each with its residual and layer norm; "layer" is both.
        count: how many follow each other.
        size: their width; 0 is the encoder's, without projections.
        heads: of their attention; 0 is the encoder's.
    """

    kind: Literal["attention", "ffn", "layer"]
    count: int
    size: int = 0
    heads: int = 0

    def __post_init__(self) -> None:
        check_size(self.count)
        check_size(self.size, least=0)
        check_size(self.heads, least=0)
        if self.size and self.size % (self.heads or 1):
            raise UserError(
                f"size {self.size} of the blocks is not a multiple of their {self.heads} heads;"
                " choose a size that is, or another number of heads."
            )

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        config = self._config(config)
        x = jnp.zeros((1, 1, config.hidden_size))
        shapes = jax.eval_shape(self._block(config).init, jax.random.key(0), x, one_position())[
            "params"
        ]
        blocks = jax.tree_util.tree_map_with_path(
            lambda path, leaf: Param((self.count, *leaf.shape), _INITS[path[-1].key]), shapes
        )
        if not self.size:
            return {"blocks": blocks}
        return {
            "down": dense(inputs, self.size),
            "blocks": blocks,
            "up": dense(self.size, outputs),
        }

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        block = self._block(self._config(context.config), x.dtype)
        key, cache = context.dropout_key, context.segments.cache

        def body(z: Any, step: Any) -> tuple[Any, Any]:
            block_params, index, entries = step
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
            segments = context.segments.inner(entries)
            return block.apply({"params": block_params}, z, segments, rngs=rngs), segments.left

        z = project(params["down"], x) if self.size else x
        # In the cache, rows come before blocks.
        entries = None if cache is None else _swapped(cache.take())
        z, left = jax.lax.scan(body, z, (params["blocks"], jnp.arange(self.count), entries))
        if cache is not None:
            cache.leave(_swapped(left))
        return project(params["up"], z) if self.size else z

    def _config(self, config: StackConfig) -> StackConfig:
        return dataclasses.replace(
            config,
            hidden_size=self.size or config.hidden_size,
            # Feed-forward blocks of twice the width meet the budget of attention blocks (1.10x).
            intermediate_size=2 * self.size or config.intermediate_size,
            num_attention_heads=self.heads or config.num_attention_heads,
        )

    def _block(self, config: StackConfig, dtype: Any = jnp.float32) -> Any:
        block = {"attention": _AttentionBlock, "ffn": _FeedForwardBlock, "layer": Layer}
        return block[self.kind](config, dtype, parent=None)


def _swapped(tree: Any) -> Any:
    """Leaves [B, N, ...] <-> [N, B, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
