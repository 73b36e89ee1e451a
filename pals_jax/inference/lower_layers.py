"""The layers below the first adapter of an encoder: the same for all tasks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, cast

import jax
import numpy as np
import optax
from jax import Array

from pals_jax.data.batch import Batch
from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.encoder import Encoder
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.shapes import adapter_shapes
from pals_jax.models.stack import layers_below
from pals_jax.runtime.parallel import DataParallel


@dataclasses.dataclass(frozen=True)
class LowerLayers:
    """The embeddings and the layers below the first adapter, without dropout.

    Attributes:
        encoder: an encoder of these layers alone.
        params: the parameters of these layers alone.
        parallel: the devices, over which every batch is divided.
    """

    encoder: Encoder
    params: optax.Params
    parallel: DataParallel

    @classmethod
    def of(cls, model: MultiTaskModel, params: Any, parallel: DataParallel) -> Self:
        """Those of a model; `params` are the parameters of its whole encoder."""
        depth = layers_below(adapter_shapes(model))
        architecture = dataclasses.replace(model.config, num_hidden_layers=depth)
        layers = jax.tree.map(lambda x: x[:depth], params["layers"])
        own = parallel.put({"embeddings": params["embeddings"], "layers": layers})
        return cls(Encoder(architecture, model.dtype), own, parallel)

    @property
    def depth(self) -> int:
        """The number of the layers."""
        return int(self.encoder.config.num_hidden_layers)

    def __call__(self, batch: Batch) -> np.ndarray:
        """The hidden states [B, L, D] above these layers, in the encoder's dtype.

        The tasks of the batch do not matter. The first call for a shape compiles.
        """
        return np.asarray(self._step(self.params, batch))

    @functools.cached_property
    def _step(self) -> Callable[[optax.Params, Batch], Array]:
        axis_name = self.parallel.axis_name
        nothing = TaskAdapters((), {}, self.encoder.config)

        def step(params: optax.Params, batch: Batch) -> Array:
            apply = cast(Callable[..., Array], self.encoder.apply)
            hidden = apply({"params": params}, *batch.tokens, nothing, batch.first)
            if axis_name is None:
                return hidden
            return jax.lax.all_gather(hidden, axis_name, tiled=True)

        return cast(Callable[[optax.Params, Batch], Array], self.parallel.compile(step))
