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
from pals_jax.models.architectures import Model
from pals_jax.models.bart import Vocabulary
from pals_jax.models.encoder import Encoder
from pals_jax.models.encoder_decoder import TextStack
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.shapes import adapter_shapes
from pals_jax.models.stack import layers_below
from pals_jax.models.transformer import StackConfig
from pals_jax.runtime.parallel import DataParallel


@dataclasses.dataclass(frozen=True)
class LowerLayers:
    """The embeddings and the layers below the first adapter, without dropout.

    Attributes:
        model: the whole model.
        config: the architecture of an encoder of these layers alone.
        params: the parameters of these layers, and of the embeddings.
        parallel: the devices, over which every batch is divided.
    """

    model: Model
    config: StackConfig
    params: optax.Params
    parallel: DataParallel

    @classmethod
    def of(cls, model: Model, params: optax.Params, parallel: DataParallel) -> Self:
        """Those of a model; `params` is the whole collection of that name."""
        depth, encoder = layers_below(adapter_shapes(model)), params["encoder"]
        config = dataclasses.replace(model.config.stacks["encoder"], num_hidden_layers=depth)
        own = {"layers": jax.tree.map(lambda x: x[:depth], encoder["layers"])}
        if "embeddings" in encoder:  # those of Marian are words alone
            own["embeddings"] = encoder["embeddings"]
        if isinstance(model, Seq2SeqModel):
            own = {"encoder": own, "vocabulary": params["vocabulary"]}
        return cls(model, config, parallel.put(own), parallel)

    @property
    def depth(self) -> int:
        """The number of the layers."""
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return self.model.dtype

    def __call__(self, batch: Batch) -> np.ndarray:
        """The hidden states [B, L, D] above these layers, in `dtype`.

        The tasks of the batch do not matter. The first call for a shape compiles.
        """
        return np.asarray(self._step(self.params, batch))

    @functools.cached_property
    def _step(self) -> Callable[[optax.Params, Batch], Array]:
        axis_name = self.parallel.axis_name

        def step(params: optax.Params, batch: Batch) -> Array:
            hidden = self._apply(params, batch)
            if axis_name is None:
                return hidden
            return jax.lax.all_gather(hidden, axis_name, tiled=True)

        return cast(Callable[[optax.Params, Batch], Array], self.parallel.compile(step))

    def _apply(self, params: Any, batch: Batch) -> Array:
        if isinstance(self.model, Seq2SeqModel):
            words = Vocabulary(self.model.config, self.dtype)
            embedded = words.apply({"params": params["vocabulary"]}, batch.input_ids)
            stack, inputs = TextStack(self.config, self.dtype), (embedded, batch.attention_mask)
            own = {"params": params["encoder"]}
            return cast(Array, stack.apply(own, *inputs, batch.first, method="lower"))
        nothing = TaskAdapters((), {}, self.config)
        encoder = Encoder(self.config, self.dtype)
        return cast(Array, encoder.apply({"params": params}, *batch.tokens, nothing, batch.first))
