"""What a head reads, where it is not what BERT's pooler makes of the first position.

Encoders that were trained to embed sentences (Reimers & Gurevych 2019) have the meaning of a text
in the mean of its last hidden states; a pooler, if there is one, was not trained with it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters.forms import Context, Params
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.transformer import StackConfig


def mean_pooling() -> Method:
    """The mean of a text's last hidden states instead of BERT's pooler; no parameters."""
    return (
        Adapter("mean", "top", Mean(), compose="replace"),
        Adapter("no_pooler", "pooled", Identity(), compose="replace"),
    )


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean over the positions of an example, at each of them; 0 at padding."""

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        del inputs, outputs, config
        return {}

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        del params
        ids = context.segments.segment_ids
        same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
        count = jnp.maximum(same.sum(-1, keepdims=True), 1)
        total = jnp.einsum(
            "blj,bjd->bld", same.astype(x.dtype), x, preferred_element_type=jnp.float32
        )
        return (total / count).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Identity:
    """Its input itself."""

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        del inputs, outputs, config
        return {}

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        del params, context
        return x
