"""A method bound to the parameters of one task, as the encoder asks for it.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from pals_jax.models.adapters.forms import Context, Params
from pals_jax.models.adapters.places import Place, places
from pals_jax.models.adapters.spec import OUTSIDE_LAYERS, Adapter, Method, TaskCopy
from pals_jax.models.segments import Segments
from pals_jax.models.transformer import Sites, StackConfig


def select(collection: Params, task_ids: Array) -> Params:
    """The rows [G, ...] of the tasks `task_ids` (int [G]) from leaves [T, ...].

    Under a trace a task id out of range cannot be refused; its rows are NaN, so that it cannot pass
    for another task.
    """

    def rows(x: Array) -> Array:
        return x.at[task_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return jax.tree.map(rows, collection)


def overlay(tree: Params, patch: Params) -> Params:
    """`tree`, its empty parts included, with the leaves of `patch` in place of its own."""
    return unflatten_dict(flatten_dict(tree, keep_empty_nodes=True) | flatten_dict(patch))


@dataclasses.dataclass(frozen=True)
class TaskAdapters:
    """A method with the parameters of one task, as one stack of layers asks for it.

    Attributes:
        method: its adapters, in the order in which they are applied, and its task copies.
        adapter_params: for each place of the method, by name, its subtree of the `adapters`
            collection, without the task axis.
        config: the architecture of the stack.
        active: bool [N]; where False, a layer goes without its adapters. None: all are active.
        block: the stack, "encoder" or "decoder".
    """

    method: Method
    adapter_params: Mapping[str, Params]
    config: StackConfig
    active: Array | None = None
    block: str = "encoder"

    @property
    def places(self) -> tuple[Place, ...]:
        """The method's places in the stack."""
        return places(self.method, self.block)

    @property
    def _adapters(self) -> Iterator[tuple[str, str, Adapter]]:
        """(name, site, adapter) of the adapters' places."""
        for place in self.places:
            if isinstance(place.part, Adapter):
                yield place.name, place.site, place.part

    @property
    def _task_copies(self) -> Iterator[tuple[str, TaskCopy]]:
        """(name, copy) of the copies' places."""
        for place in self.places:
            if isinstance(place.part, TaskCopy):
                yield place.name, place.part

    def _of(self, name: str) -> Params:
        """The parameters of an adapter's place, of which there may be none."""
        return self.adapter_params.get(name, {})

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each run of consecutive layers that carry the same adapters."""
        depth = self.config.num_hidden_layers
        carried = [
            tuple(place.name for place in self.places if layer in place.part.layer_indices(depth))
            for layer in range(depth)
        ]
        start = 0
        for stop in range(1, depth + 1):
            if stop == depth or carried[stop] != carried[start]:
                yield start, stop
                start = stop

    def layers(self, start: int, stop: int) -> dict[str, Params]:
        """Per-layer parameters [stop - start, ...] of the adapters that the span carries."""
        return {
            name: jax.tree.map(
                partial(self._span, adapter, start, stop),
                self._of(name).get("layers", {}),
            )
            for name, _, adapter in self._adapters
            if start in adapter.layer_indices(self.config.num_hidden_layers)
        }

    def own_layers(self, layers: Params, start: int, stop: int) -> Params:
        """The span's parameters `layers` [stop - start, ...], with the task's copies in."""
        for name, task_copy in self._task_copies:
            mine = self.adapter_params[name].get("layers")
            if mine and start in task_copy.layer_indices(self.config.num_hidden_layers):
                mine = jax.tree.map(partial(self._span, task_copy, start, stop), mine)
                layers = overlay(layers, mine)
        return layers

    def layer(self, index: int) -> dict[str, Params]:
        """The parameters of the adapters that one layer carries."""
        return jax.tree.map(lambda x: x[0], self.layers(index, index + 1))

    def own_layer(self, layer: Params, index: int) -> Params:
        """One layer's parameters `layer`, with the task's copies in."""
        layers = self.own_layers(jax.tree.map(lambda x: x[None], layer), index, index + 1)
        return jax.tree.map(lambda x: x[0], layers)

    def own_outside(self, stack: Params) -> Params:
        """The stack's parameters with the task's copies of those outside the layers in place."""
        for name, _ in self._task_copies:
            mine = {k: v for k, v in self.adapter_params[name].items() if k != "layers"}
            stack = overlay(stack, mine)
        return stack

    def _span(self, part: Adapter | TaskCopy, start: int, stop: int, x: Array) -> Array:
        first = part.layer_indices(self.config.num_hidden_layers).index(start)
        return x[first : first + stop - start]

    def sites(
        self,
        segments: Segments,
        key: Array | None,
        layer: Mapping[str, Params] | None = None,
        active: Array | None = None,
    ) -> Sites:
        """The sites of one layer or, without `layer`, the sites below and above all layers.

        Args:
            segments: which example each position belongs to.
            key: the key of their dropout masks; None turns dropout off.
            layer: the layer's slice of `layers`.
            active: bool scalar; whether the layer's adapters are active. None: they are.
        """
        adapters = tuple(self._adapters)
        if layer is None:
            layer = {name: {} for name, site, _ in adapters if site in OUTSIDE_LAYERS}
        of_layer = segments

        def at(
            site: str,
            state: Array,
            block_input: Array,
            *,
            normalise: Any = None,
            segments: Segments | None = None,
            **of_heads: Any,
        ) -> Array:
            for index, (name, where, adapter) in enumerate(adapters):
                if where != site or name not in layer:
                    continue
                params = {**self._of(name).get("shared", {}), **layer[name]}
                own_key = None if key is None else jax.random.fold_in(key, index)
                of_state = of_layer if segments is None else segments
                context = Context(self.config, of_state, own_key, **of_heads)
                x = block_input if adapter.reads == "block_input" else state
                x = normalise(x) if adapter.reads == "normalised" else x
                with jax.named_scope("adapters"):
                    changed = adapter.change(params, state, x, context)
                state = changed if active is None else jnp.where(active, changed, state)
            return state

        return at
