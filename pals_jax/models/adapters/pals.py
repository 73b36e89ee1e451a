"""PALs and their kin: layers between the projections V^E and V^D (Stickland & Murray, section 3.3).

V^E projects a hidden state into a small space and V^D projects back. Each is one matrix for all
layers, or one for each, as `Adapter.shared` says: `spec.Adapter.parameters` keeps one copy of what
is shared, and `bound.TaskAdapters` gives it to every layer.
"""

from typing import Literal

from pals_jax.models.adapters.forms import (
    Bottleneck,
    Form,
    ProjectedAttention,
    ProjectedFeedForward,
)
from pals_jax.models.adapters.spec import Adapter, Layers, Method

V_E, V_D = "down", "up"  # the parameters of a form that the paper calls V^E and V^D


def pals(
    size: int = 204,
    heads: int = 6,
    layers: Layers = "all",
    shared: bool = True,
    serial: bool = False,
) -> Method:
    """Projected attention layers (section 3.3).

    Args:
        size: d_s, the width of the small attention.
        heads: its number of heads; 6 in the authors' code.
        layers: the layers that carry one.
        shared: whether V^E and V^D are one for all layers.
        serial: on the layer's path, reading its sum, instead of beside it.
    """
    form = ProjectedAttention(size, heads)
    return _beside_layer("pal", form, layers, serial, (V_E, V_D) if shared else ())


def low_rank(
    size: int = 100, activation: str = "identity", layers: Layers = "all", serial: bool = False
) -> Method:
    """Low-rank layers V^D V^E h (section 3.3).

    Args:
        size: d_s, the rank.
        activation: between V^E and V^D: "identity" in the paper, "gelu" in the authors' code.
        layers: the layers that carry one.
        serial: on the layer's path, reading its sum, instead of beside it.
    """
    return _beside_layer("low_rank", Bottleneck(size, activation), layers, serial, ())


def projected_ffn(size: int = 204, depth: int = 1, layers: Layers = "all") -> Method:
    """A feed-forward network of one or two layers between shared V^E and V^D (section 3.3)."""
    form = ProjectedFeedForward(size, depth)
    return _beside_layer("projected_ffn", form, layers, False, (V_E, V_D))


def _beside_layer(
    name: str, form: Form, layers: Layers, serial: bool, shared: tuple[str, ...]
) -> Method:
    reads: Literal["state", "block_input"] = "state" if serial else "block_input"
    return (Adapter(name, "layer", form, reads, layers, shared),)
