"""A stack of layers: one set of stacked parameters, scanned in spans.

Compile time must not grow with depth, so the layers' parameters are stacked on a leading axis N
and a `lax.scan` walks over them. Adapters may sit on some layers only; consecutive layers that
carry the same adapters form a span, and each span is one scan. With adapters on every layer, on
the first or on the final half there are one or two spans.

Dimension letters: see `pals_jax.models.layers`.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.spec import TaskCopy
from pals_jax.models.layers import SAVED
from pals_jax.models.segments import Segments, one_position
from pals_jax.models.transformer import Layer, Source


class Stack(nn.Module):
    """N layers; what comes below and above them is that of an architecture.

    Attributes:
        config: the architecture, a `transformer.StackConfig`.
        dtype: dtype of the computation; parameters, layer norm statistics and softmax are float32.
        remat: recompute each whole layer in the backward pass, matrix products included.
    """

    config: Any
    dtype: Any = jnp.float32
    remat: bool = False

    def init_layers(self, key: Array, source: Source | None = None) -> dict[str, Any]:
        """Parameters of N independent layers, each leaf with a leading axis N."""
        h = jnp.zeros((1, 1, self.config.hidden_size), self.dtype)
        keys = jax.random.split(key, self.config.num_hidden_layers)

        def init(key: Array) -> Any:
            return self._layer().init(key, h, one_position(), source=source)["params"]

        return jax.vmap(init)(keys)

    def _layer(self) -> Layer:
        # Without a parent: the scan applies it to one slice of the layers' parameters at a time.
        return Layer(self.config, self.dtype, parent=None)

    def dropout_keys(self) -> tuple[Any, Any, Any]:
        """Keys of the dropout masks below the layers, in each of them [N], and above them."""
        if not self.has_rng("dropout"):
            return None, None, None
        below, key, above = jax.random.split(self.make_rng("dropout"), 3)
        return below, jax.random.split(key, self.config.num_hidden_layers), above

    def through_layers(
        self,
        layers: Any,
        h: Array,
        segments: Segments,
        keys: Array | None,
        adapters: TaskAdapters,
        source: Source | None = None,
        begin: int = 0,
    ) -> Array:
        """What the layers from `begin` make of h, [B, L, D].

        Args:
            layers: their parameters, leaves [N, ...].
            h: [B, L, D]; the input of the layer `begin`, at which a span begins.
            segments: of the positions.
            keys: [N]; of the dropout masks. None: dropout is off.
            adapters: those of the rows' task.
            source: what cross attention reads. None: the layers have none.
            begin: the first layer that is computed.
        """
        for start, stop in adapters.spans():
            if start >= begin:
                h = self._scan(layers, h, segments, keys, adapters, source, start, stop)
        return h

    def step_through_layers(
        self,
        layers: tuple[Any, ...],
        h: Array,
        segments: Segments,
        adapters: TaskAdapters,
        sources: tuple[Source, ...],
        entries: tuple[Any, ...] | None,
    ) -> tuple[Array, tuple[Any, ...]]:
        """What the layers make of one position of each text, and what they leave in the cache.

        The layers follow each other in the program, because a scan would copy the slices of their
        parameters and of the cache in every step.

        Args:
            layers: the parameters of each layer, `unstacked`.
            h: [B, L, D].
            segments: of the L variants of the position; see `next_position`.
            adapters: those of the rows' task.
            sources: what the cross attention of each layer reads.
            entries: of the cache, for each layer. None: all are zero.
        """
        left = []
        for i, (params, source) in enumerate(zip(layers, sources, strict=True)):
            here = segments.inner(None if entries is None else entries[i])
            sites = adapters.sites(here, None, adapters.layer(i))
            own = {"params": adapters.own_layer(params, i)}
            h = cast(Array, self._layer().apply(own, h, here, sites, source))
            left.append(here.left)
        return h, tuple(left)

    def read_through_layers(
        self, layers: tuple[Any, ...], source: Source, adapters: TaskAdapters
    ) -> tuple[tuple[Array, Array], ...]:
        """For each layer the keys and values of its cross attention, [B, H, J, K].

        Args:
            layers: the parameters of each layer, `unstacked`.
            source: what cross attention reads.
            adapters: those of the rows' task.
        """
        read = []
        for i, params in enumerate(layers):
            sites = adapters.sites(source.segments, None, adapters.layer(i))
            own = {"params": adapters.own_layer(params, i)}
            of_layer = self._layer().apply(own, source, sites, method="read_source")
            read.append(cast(tuple[Array, Array], of_layer))
        return tuple(read)

    def _scan(
        self,
        layers: Any,
        h: Array,
        segments: Segments,
        keys: Array | None,
        adapters: TaskAdapters,
        source: Source | None,
        start: int,
        stop: int,
    ) -> Array:
        """Applies the layers start to stop - 1, which all carry the same adapters."""

        def body(h: Any, layer: Any) -> tuple[Any, None]:
            params, adapter_params, key, active = layer
            rngs = {} if key is None else {"dropout": key}
            sites = adapters.sites(segments, key, adapter_params, active)
            h = self._layer().apply({"params": params}, h, segments, sites, source, rngs=rngs)
            return h, None

        # Save only matmul outputs and what is named; recomputing the rest is cheaper than storing
        # it. With remat, save nothing.
        policies = jax.checkpoint_policies
        named = policies.save_only_these_names(SAVED)
        kept = policies.save_from_both_policies(policies.dots_saveable, named)
        body = jax.checkpoint(body, policy=None if self.remat else kept, prevent_cse=False)
        params, keys, active = jax.tree.map(
            lambda x: x[start:stop], (layers, keys, adapters.active)
        )
        params = adapters.own_layers(params, start, stop)
        h, _ = jax.lax.scan(body, h, (params, adapters.layers(start, stop), keys, active))
        return h


def unstacked(layers: Any) -> tuple[Any, ...]:
    """The parameters of each layer, of leaves [N, ...]."""
    depth = len(jax.tree.leaves(layers)[0])
    return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth))


def given_or(module: nn.Module, name: str, init: Callable[[Array], Any]) -> Any:
    """The parameters of that name if they are given, else new ones.

    `module.param` alone would trace `init` again to check the shapes of what is given, which takes
    a third of all tracing where `init` is a whole stack of layers. So nothing checks the shapes of
    given parameters here: a wrong one fails in the first operation that reads it.
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
    for place in adapters.places:
        indices = place.part.layer_indices(depth)
        if isinstance(place.part, TaskCopy):
            mine = adapters.adapter_params[place.name]
            changes_embeddings, indices = "embeddings" in mine, indices if "layers" in mine else ()
        else:
            changes_embeddings = place.part.site == "embeddings"
        lowest[place.name] = 0 if changes_embeddings else min(indices, default=depth)
    return lowest
