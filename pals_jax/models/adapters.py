"""Adapters: what to add, at which site of which layers, out of which task's parameters.

Every method is a tuple of `Adapter` values in the words of one sentence: at a site of the
encoder, add a small function (a form) of a hidden state, whose parameters belong to a task.

The parameters live in the `adapters` collection, each leaf with a leading task axis:

    {adapter name: {"shared": {projection: {kernel, bias: [T, ...]}},
                    "layers": {projection: {kernel, bias: [T, n, ...]}}}}

where n counts the layers that carry the adapter and "shared" holds what all of them use (V^E and
V^D of PALs). A task is data: `select` takes the rows of the tasks of a batch, and from there on
nothing knows which task it is.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.errors import UserError
from pals_jax.models.bert import SITES, Sites
from pals_jax.models.forms import Context, Form, Param, Theta

Layers = Literal["all", "first_half", "final_half"] | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One form at one site.

    Attributes:
        name: its key in the `adapters` collection.
        site: the state that is changed, one of `pals_jax.models.bert.SITES`.
        form: the function and its size.
        reads: "block_input" (in parallel with the block) or "state" (serially, the site's own).
        layers: "all", "first_half", "final_half", or the indices of layers, from 0.
        shared: the form's projections that are one for all layers.
    """

    name: str
    site: str
    form: Form
    reads: Literal["block_input", "state"] = "block_input"
    layers: Layers = "all"
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise UserError(f"no site {self.site!r} in the encoder; sites are {', '.join(SITES)}.")
        if self.reads not in ("block_input", "state"):
            raise UserError(f"an adapter reads block_input or state, not {self.reads!r}.")

    def layer_indices(self, depth: int) -> tuple[int, ...]:
        """The layers that carry it, ascending, in an encoder of `depth` layers."""
        named = {
            "all": range(depth),
            "first_half": range(depth // 2),
            "final_half": range(depth - depth // 2, depth),
        }
        if isinstance(self.layers, str):
            if self.layers not in named:
                raise UserError(
                    f"layers={self.layers!r} is not known;"
                    f" it is {', '.join(named)}, or a list of indices."
                )
            return tuple(named[self.layers])
        if (
            not isinstance(self.layers, tuple)
            or not self.layers
            or set(self.layers) - set(range(depth))
        ):
            raise UserError(
                f"layers={self.layers} names no layer or one that does not exist;"
                f" the encoder's {depth} layers are 0 to {depth - 1}."
            )
        return tuple(sorted(set(self.layers)))

    def parameters(self, hidden_size: int, depth: int) -> dict[str, Any]:
        """What one task owns: {"shared": ..., "layers": ...} with leaves `Stack`."""
        projections = self.form.parameters(hidden_size)
        unknown = set(self.shared) - set(projections)
        if unknown:
            raise UserError(
                f"adapter {self.name!r} shares {sorted(unknown)} between layers, but its form has"
                f" only {sorted(projections)}."
            )
        count = len(self.layer_indices(depth))
        tree: dict[str, Any] = {}
        for name, params in projections.items():
            part, sizes = ("shared", ()) if name in self.shared else ("layers", (count,))
            stacks = {leaf: Stack(param, sizes) for leaf, param in params.items()}
            tree.setdefault(part, {})[name] = stacks
        return tree


class Stack(NamedTuple):
    """A parameter repeated along leading axes, for example one for each layer."""

    param: Param
    sizes: tuple[int, ...] = ()


def init(key: Array, stacks: Any, num_tasks: int) -> Theta:
    """Initial values, drawn independently for every task and layer.

    Args:
        key: random key.
        stacks: tree of `Stack`.
        num_tasks: T.

    Returns:
        The same tree with float32 leaves [T, *sizes, *shape].
    """
    leaves, structure = jax.tree.flatten(stacks, is_leaf=lambda x: isinstance(x, Stack))
    keys = jax.random.split(key, len(leaves))
    values = [
        stack.param.init(key, (num_tasks, *stack.sizes, *stack.param.shape), jnp.float32)
        for key, stack in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)


def select(collection: Theta, task_ids: Array) -> Theta:
    """The rows [G, ...] of the tasks `task_ids` (int [G]) from leaves [T, ...].

    A task id out of range gives NaN where it could not be refused before (under a trace): it must
    not pass for another task.
    """

    def rows(x: Array) -> Array:
        return x.at[task_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return jax.tree.map(rows, collection)


@dataclasses.dataclass(frozen=True)
class TaskAdapters:
    """The adapters with the parameters of a batch's tasks, as the encoder asks for them.

    Attributes:
        adapters: in the order in which they are applied.
        thetas: {adapter name: {"shared", "layers"}} with leaves [G, ...] and [G, n, ...].
        depth: number of layers of the encoder.
        dropout_rate: of attention weights, for forms that have any.
    """

    adapters: tuple[Adapter, ...]
    thetas: Mapping[str, Theta]
    depth: int
    dropout_rate: float

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the runs of consecutive layers that carry the same adapters."""
        carried = [
            tuple(a.name for a in self.adapters if layer in a.layer_indices(self.depth))
            for layer in range(self.depth)
        ]
        start = 0
        for stop in range(1, self.depth + 1):
            if stop == self.depth or carried[stop] != carried[start]:
                yield start, stop
                start = stop

    def layers(self, start: int, stop: int) -> dict[str, Theta]:
        """Per-layer parameters [stop - start, G, ...] of the adapters that the span carries."""

        def rows(adapter: Adapter, x: Array) -> Array:
            first = adapter.layer_indices(self.depth).index(start)
            return jnp.moveaxis(x[:, first : first + stop - start], 1, 0)

        return {
            a.name: jax.tree.map(partial(rows, a), self.thetas[a.name].get("layers", {}))
            for a in self.adapters
            if start in a.layer_indices(self.depth)
        }

    def sites(self, layer: Mapping[str, Theta], mask: Array, key: Array | None) -> Sites:
        """The sites of one layer.

        Args:
            layer: that layer's slice of `layers`, leaves [G, ...].
            mask: bool [B, 1, 1 or L, L].
            key: the layer's dropout key, or None.
        """

        def at(site: str, state: Array, block_input: Array) -> Array:
            for index, adapter in enumerate(self.adapters):
                if adapter.site == site and adapter.name in layer:
                    theta = {**self.thetas[adapter.name].get("shared", {}), **layer[adapter.name]}
                    own_key = None if key is None else jax.random.fold_in(key, index)
                    context = Context(mask, self.dropout_rate, own_key)
                    x = state if adapter.reads == "state" else block_input
                    state = state + adapter.form(theta, x, context)
            return state

        return at
