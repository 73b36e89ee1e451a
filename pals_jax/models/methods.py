"""The methods, as values in the design space: each is a function that returns its adapters."""

import ast
from collections.abc import Callable, Mapping

from pals_jax.errors import UserError
from pals_jax.models.adapters import Adapter, Layers
from pals_jax.models.forms import Bottleneck, ProjectedAttention

Method = tuple[Adapter, ...]


def shared() -> Method:
    """Nothing but the heads: one encoder shared by all tasks (Stickland & Murray, "Shared")."""
    return ()


def pals(size: int = 204, heads: int = 6, layers: Layers = "all", shared: bool = True) -> Method:
    """Projected attention layers (Stickland & Murray, section 3.3).

    Args:
        size: d_s, the width of the small attention.
        heads: its number of heads; 6 in the authors' code.
        layers: the layers that carry one.
        shared: whether V^E and V^D are one for all layers.
    """
    form = ProjectedAttention(size, heads)
    return (Adapter("pal", "layer", form, layers=layers, shared=("down", "up") if shared else ()),)


def low_rank(size: int = 100, activation: str = "identity", layers: Layers = "all") -> Method:
    """Low-rank layers V^D V^E h (Stickland & Murray, section 3.3).

    Args:
        size: d_s, the rank.
        activation: between V^E and V^D: "identity" in the paper, "gelu" in the authors' code.
        layers: the layers that carry one.
    """
    return (Adapter("low_rank", "layer", Bottleneck(size, activation), layers=layers),)


METHODS: Mapping[str, Callable[..., Method]] = {
    "shared": shared,
    "pals": pals,
    "low_rank": low_rank,
}


def parse(text: str) -> Method:
    """The method that an expression such as `pals(size=276, layers="final_half")` names.

    Raises:
        UserError: not such an expression, an unknown method, an unknown or ill-typed option.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        call = ast.Call(call, [], []) if isinstance(call, ast.Name) else call
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
            raise ValueError
        name = call.func.id
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
        if len(options) < len(call.keywords) or "None" in options:  # repeated, or **options
            raise ValueError
    except (SyntaxError, ValueError):
        raise UserError(
            f"cannot read the method {text!r}; write it as a name with options,"
            ' for example pals(size=204, layers="final_half").'
        ) from None
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; known are {', '.join(METHODS)}.")
    try:
        # Lists of layers become tuples: a method is a value that a module may hold.
        return METHODS[name](
            **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        )
    except TypeError as error:
        raise UserError(f"method {text!r}: {error}.") from None
