"""Adapters: what to change, at which site of which layers, out of which task's parameters.

Every method is a tuple of values in the words of one sentence: at a site of the encoder, add, or
multiply in, a small function (a form) of a hidden state, whose parameters belong to a task. An
`Adapter` says that sentence; a `TaskCopy` says that a task has its own copy of some of the
encoder's parameters (layer norms, biases, whole layers).

The parameters live in the `adapters` collection, each leaf with a leading task axis:

    {adapter name: {"shared": {parameter: [T, ...]}, "layers": {parameter: [T, n, ...]}},
     task copy's name: {"layers": {the encoder's own path: [T, n, ...]}, the rest of it: [T, ...]}}

where n counts the layers concerned and "shared" holds what all of them use (V^E and V^D of PALs).
In an encoder-decoder a part has one such entry for each place where it acts; see `places`.
A task is data: `select` takes the rows of the tasks of a batch, and from there on nothing knows
which task it is.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
import math
import re
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from pals_jax.models.adapters.forms import Context, Form, Param, Params
from pals_jax.models.transformer import SITES, StackConfig
from pals_jax.runtime.errors import UserError

Layers = Literal["all", "first_half", "final_half"] | tuple[int, ...]

READS = ("block_input", "state", "normalised")
COMPOSITIONS = ("add", "gate", "multiply", "replace", "concat")
OUTSIDE_LAYERS = ("embeddings", "top", "pooled")  # the sites that are not in the layers
BLOCKS = ("encoder", "decoder")
ATTENTIONS = ("self", "cross")


def layer_indices(layers: Layers, depth: int) -> tuple[int, ...]:
    """The indices that `layers` means in an encoder of `depth` layers, ascending.

    Raises:
        UserError: there are no such layers.
    """
    named = {
        "all": range(depth),
        "first_half": range(depth // 2),
        "final_half": range(depth - depth // 2, depth),
    }
    if isinstance(layers, str):
        if layers not in named:
            raise UserError(
                f"layers={layers!r} is not known; it is {', '.join(named)}, or a list of indices."
            )
        return tuple(named[layers])
    whole = isinstance(layers, tuple) and all(type(index) is int for index in layers)
    if not whole or not layers or set(layers) - set(range(-depth, depth)):
        raise UserError(
            f"layers={layers} names no layer or one that does not exist;"
            f" the encoder's {depth} layers are 0 to {depth - 1}, or from the top -1 to -{depth}."
        )
    return tuple(sorted({index % depth for index in layers}))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One form at one site.

    Attributes:
        name: its key in the `adapters` collection.
        site: the state that is changed, a key of `pals_jax.models.transformer.SITES`.
        form: the function and its size.
        reads: its input: "block_input" (parallel insertion), "state" (sequential insertion: the
            state at the site itself), or "normalised" (the layer norm of state + residual).
        layers: "all", "first_half", "final_half", or indices from 0, or from the top from -1.
        shared: names of the form's parameters that all layers share (V^E and V^D of PALs).
        compose: how the state h takes the form's delta: "add" (h + s delta), "gate"
            ((1 - lambda) h + lambda delta), "multiply", "replace", or "concat" (more positions).
        scale: s, or "learned".
        blocks: the stacks in which it acts, where a model has them: "encoder", "decoder". By
            default all, as in He et al.
        attention: at the site of an attention, at which of a decoder's: "self", "cross".
    """

    name: str
    site: str
    form: Form
    reads: Literal["block_input", "state", "normalised"] = "block_input"
    layers: Layers = "all"
    shared: tuple[str, ...] = ()
    compose: Literal["add", "gate", "multiply", "replace", "concat"] = "add"
    scale: float | Literal["learned"] = 1.0
    blocks: tuple[str, ...] = BLOCKS
    attention: tuple[str, ...] = ATTENTIONS

    def __post_init__(self) -> None:
        _check_some("blocks", self.blocks, BLOCKS)
        _check_some("attention", self.attention, ATTENTIONS)
        if self.site not in SITES:
            raise UserError(f"no site {self.site!r} in the encoder; sites are {', '.join(SITES)}.")
        if self.reads not in READS:
            raise UserError(f"an adapter reads {', '.join(READS)}, not {self.reads!r}.")
        if self.compose not in COMPOSITIONS:
            raise UserError(
                f"an adapter is composed by {', '.join(COMPOSITIONS)}, not {self.compose!r}."
            )
        if self.scale != "learned" and not (
            isinstance(self.scale, (int, float)) and math.isfinite(self.scale)
        ):
            raise UserError(f"an adapter's scale is a number or 'learned', not {self.scale!r}.")
        if self.compose == "gate" and not hasattr(self.form, "gate"):
            raise UserError(f"{type(self.form).__name__} has no gate to be composed by.")
        if self.reads == "normalised" and self.site not in ("attention.output", "ffn.output"):
            raise UserError(f"there is no layer norm behind {self.site} for {self.name!r} to read.")
        if self.compose == "concat" and self.site != "embeddings":
            raise UserError(f"positions can be added at the embeddings only, not at {self.site}.")

    def layer_indices(self, depth: int) -> tuple[int, ...]:
        """The layers that carry it; none where the site is below or above the layers."""
        return () if self.site in OUTSIDE_LAYERS else layer_indices(self.layers, depth)

    def parameters(self, config: StackConfig) -> dict[str, Any]:
        """The parameters of one task: {"shared": ..., "layers": ...} with leaves `Repeated`."""
        sizes = {"D": config.hidden_size, "F": config.intermediate_size}
        site = SITES[self.site]
        inputs = sizes[site.block_input if self.reads == "block_input" else site.state]
        params: dict[str, Any] = dict(self.form.parameters(inputs, sizes[site.state], config))
        if unknown := set(self.shared) - set(params):
            raise UserError(
                f"adapter {self.name!r} shares {sorted(unknown)} between layers, but its form has"
                f" only {sorted(params)}."
            )
        if self.scale == "learned":
            params["scale"] = Param((), jax.nn.initializers.ones)
        depth = config.num_hidden_layers
        count = (len(self.layer_indices(depth)),)
        tree: dict[str, Any] = {}
        for name, param in params.items():
            everywhere = name in self.shared or self.site in OUTSIDE_LAYERS
            lead, part = ((), "shared") if everywhere else (count, "layers")
            repeated = partial(Repeated, sizes=lead)
            tree.setdefault(part, {})[name] = jax.tree.map(
                repeated, param, is_leaf=lambda x: isinstance(x, Param)
            )
        return tree

    def change(self, params: Params, state: Array, x: Array, context: Context) -> Array:
        """The changed state, in its own dtype."""
        delta = self.form(params, x, context)
        if self.compose == "add":
            scale = params["scale"].astype(delta.dtype) if self.scale == "learned" else self.scale
            return state + scale * delta
        if self.compose == "gate":
            gate = self.form.gate(params, x, context)  # type: ignore[attr-defined]
            return (1.0 - gate) * state + gate * delta
        if self.compose == "multiply":
            return state * delta.reshape((1,) * (state.ndim - delta.ndim) + delta.shape)
        return delta if self.compose == "replace" else jnp.concatenate([state, delta], axis=1)


@dataclasses.dataclass(frozen=True)
class TaskCopy:
    """A task's own copy of some of the encoder's parameters, initialised with their values.

    Attributes:
        name: its key in the `adapters` collection.
        pattern: regular expression for paths in the encoder, for example "layers/.*norm/".
        layers: the layers whose parameters are copied, for paths below `layers/`; see `Adapter`.
        blocks: the stacks whose parameters are copied; see `Adapter`.
    """

    name: str
    pattern: str
    layers: Layers = "all"
    blocks: tuple[str, ...] = BLOCKS

    def __post_init__(self) -> None:
        _check_some("blocks", self.blocks, BLOCKS)

    def layer_indices(self, depth: int) -> tuple[int, ...]:
        """The layers concerned."""
        return layer_indices(self.layers, depth)

    def take(self, encoder: Params, depth: int) -> Params:
        """The encoder's parameters that it copies."""
        indices = list(self.layer_indices(depth))
        return unflatten_dict(
            {
                path: leaf[jnp.array(indices)] if path[0] == "layers" else leaf
                for path, leaf in self.matches(encoder).items()
            }
        )

    def matches(self, encoder: Params) -> dict[tuple[str, ...], Any]:
        """The encoder's parameters that it copies, of all layers, by path."""
        return {
            path: leaf
            for path, leaf in flatten_dict(encoder).items()
            if re.match(self.pattern, "/".join(path))
        }

    def leaves(self, encoder: Params, depth: int) -> set[tuple[str, int]]:
        """The (path, layer) pairs that it copies; layer is -1 outside the layers."""
        return {
            ("/".join(path), layer)
            for path in flatten_dict(self.take(encoder, depth))
            for layer in (self.layer_indices(depth) if path[0] == "layers" else (-1,))
        }

    def copies(self, encoder: Params, depth: int, num_tasks: int) -> Params:
        """Initial values: for each of the T tasks a copy, leaves [T, ...]."""
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_tasks, *x.shape)), self.take(encoder, depth)
        )


Method = tuple[Adapter | TaskCopy, ...]


def prompt_length(method: Method) -> int:
    """How many positions a method adds to each example."""
    prompts = (s for s in method if isinstance(s, Adapter) and s.compose == "concat")
    return sum(prompt.form.length for prompt in prompts)  # type: ignore[attr-defined]


def _check_some(what: str, chosen: Any, known: tuple[str, ...]) -> None:
    if not isinstance(chosen, tuple) or not chosen or set(chosen) - set(known):
        raise UserError(f"{what} is a list of some of {', '.join(known)}, not {chosen!r}.")


class Repeated(NamedTuple):
    """A parameter repeated along leading axes, for example one for each layer."""

    param: Param
    sizes: tuple[int, ...] = ()


def init(key: Array, params: Any, num_tasks: int) -> Params:
    """Initial values, drawn independently for every task and layer.

    Args:
        key: random key.
        params: tree of `Repeated`.
        num_tasks: T.

    Returns:
        The same tree with float32 leaves [T, *sizes, *shape].
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Repeated))
    keys = jax.random.split(key, max(len(leaves), 1))
    values = [
        leaf.param.init(key, (num_tasks, *leaf.sizes, *leaf.param.shape), jnp.float32)
        for key, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, values)
