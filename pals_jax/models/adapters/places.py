"""Where the parts of a method act in an architecture.

A part says once what it does; an encoder-decoder has more places for it than an encoder. The
method LoRA at the queries, for example, acts at the queries of the encoder, of the decoder, and of
the decoder's cross attention, with parameters of its own at each. A `Place` is one of these.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from pals_jax.models.adapters.forms import Params
from pals_jax.models.adapters.spec import ATTENTIONS, Adapter, Method, TaskCopy
from pals_jax.models.transformer import StackConfig
from pals_jax.runtime.errors import UserError


class Place(NamedTuple):
    """One place of a part of a method.

    Attributes:
        part: what acts there.
        block: "encoder" or "decoder", the stack of layers.
        attention: of a decoder's attentions "self" or "cross", or "self" where there is no choice.
    """

    part: Adapter | TaskCopy
    block: str
    attention: str = "self"

    @property
    def name(self) -> str:
        """Its key in the `adapters` collection: NAME, "decoder.NAME" or "decoder.cross.NAME"."""
        lead = "" if self.block == "encoder" else f"{self.block}."
        return f"{lead}{'cross.' * (self.attention == 'cross')}{self.part.name}"

    def has_parameters(self, config: StackConfig) -> bool:
        """Whether it has a subtree of the `adapters` collection."""
        return isinstance(self.part, TaskCopy) or bool(self.part.parameters(config))

    @property
    def adapter(self) -> Adapter:
        """The part, where it is an adapter."""
        assert isinstance(self.part, Adapter)
        return self.part

    @property
    def site(self) -> str:
        """An adapter's site, as the layers of its stack call it."""
        return f"{'cross_' * (self.attention == 'cross')}{self.adapter.site}"


def places(method: Method, block: str = "encoder") -> tuple[Place, ...]:
    """The places of a method in one stack, in the order in which adapters are applied."""
    return tuple(
        Place(part, block, attention)
        for part in method
        if block in part.blocks
        for attention in _attentions(part, block)
    )


def _attentions(part: Adapter | TaskCopy, block: str) -> tuple[str, ...]:
    """The attentions of a stack at which a part acts; ("self",) where there is no choice."""
    if isinstance(part, TaskCopy):
        return ("self",)
    if part.compose == "concat":  # Positions are added to a source, which all of a target sees.
        return ("self",) if block == "encoder" else ()
    if not part.site.startswith("attention."):
        return ("self",)
    return tuple(x for x in part.attention if x == "self" or block == "decoder")


def within(
    method: Method, blocks: tuple[str, ...] | None = None, attention: tuple[str, ...] | None = None
) -> Method:
    """The same method in some of its places only.

    Args:
        method: a method.
        blocks: any of "encoder", "decoder"; None: where the method is by itself.
        attention: any of "self", "cross"; None: at all its attentions.

    Raises:
        UserError: there are no such places, or the method changes no attention.
    """
    if blocks is not None:
        method = tuple(dataclasses.replace(part, blocks=blocks) for part in method)
    if attention is None:
        return method
    if all(isinstance(part, TaskCopy) or "attention." not in part.site for part in method):
        raise UserError(
            f"the option attention is for methods that change one of {', '.join(ATTENTIONS)}"
            " attention; leave it out."
        )
    return tuple(
        dataclasses.replace(part, attention=attention) if isinstance(part, Adapter) else part
        for part in method
    )


def check(method: Method, stacks: Mapping[str, StackConfig], params: Mapping[str, Params]) -> None:
    """Refuses a method whose parts collide, or have no place.

    Args:
        method: the method.
        stacks: the architecture of each stack of layers: "encoder", "decoder".
        params: their parameters.

    Raises:
        UserError: two parts have one name, replace or gate one state, or copy one parameter; or one
            has nothing to act on.
    """
    names = ["head", *(part.name for part in method)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the method has two parts named {repeated[0]!r}; they would collide.")
    for block, config in stacks.items():
        _check_collisions(places(method, block), params[block], config.num_hidden_layers)
    for part in method:
        if not any(_acts(place, params[b]) for b in stacks for place in places((part,), b)):
            raise UserError(
                f"{part.name!r} has no place in this model, whose blocks are"
                f" {' and '.join(stacks)}; leave it out, or let it act elsewhere."
            )


def _check_collisions(of_block: tuple[Place, ...], params: Params, depth: int) -> None:
    taken: dict[object, str] = {}
    for place in of_block:
        part = place.part
        if isinstance(part, TaskCopy):
            changed: set[tuple[str, int]] = part.leaves(params, depth)
        elif part.compose in ("replace", "gate"):
            changed = {(place.site, layer) for layer in part.layer_indices(depth) or (-1,)}
        else:
            continue
        for what in sorted(changed):
            if what in taken:
                raise UserError(
                    f"{taken[what]!r} and {part.name!r} collide at {what[0]}: only one of them"
                    " can have it; leave one out of the method."
                )
            taken[what] = part.name


def _acts(place: Place, params: Params) -> bool:
    if isinstance(place.part, Adapter):
        return place.site != "pooled" or "pooler" in params
    return bool(place.part.matches(params))
