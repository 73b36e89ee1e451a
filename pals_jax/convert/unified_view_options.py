"""The options of He et al.'s code that its checkpoints on all architectures share."""

from collections.abc import Mapping
from typing import Any, Literal

from pals_jax.models.adapters import methods
from pals_jax.models.adapters.spec import Method
from pals_jax.runtime.errors import UserError

PREFIX = "prefix/"  # before the names of the prefix module's tensors

_OPTIONS = {
    *("attn_mode", "attn_option", "attn_composition", "attn_bn", "mid_dim"),
    *("ffn_mode", "ffn_option", "ffn_bn", "ffn_adapter_layernorm_option"),
    *("ffn_adapter_init_option", "ffn_adapter_scalar", "lora_alpha", "lora_dropout"),
}


def check(config: Mapping[str, Any]) -> None:
    """Refuses a config that lacks options."""
    if missing := _OPTIONS - set(config):
        raise UserError(f"the unified-view config lacks {', '.join(sorted(missing))}.")


def lora(config: Mapping[str, Any], rank: int, targets: tuple[str, ...]) -> Method:
    """LoRA of a rank at some of its targets."""
    return methods.lora(rank, config["lora_alpha"], targets, config["lora_dropout"])


def scale(scalar: Any) -> float | Literal["learned"]:
    """Their option is a string: a number, or "learnable_scalar"."""
    if scalar == "learnable_scalar":
        return "learned"
    try:
        return float(scalar)
    except (TypeError, ValueError):
        raise not_held(ffn_adapter_scalar=scalar) from None


def not_held(**given: Any) -> UserError:
    """The error for options that are not supported."""
    named = " and ".join(f"{name} {value!r}" for name, value in given.items())
    return UserError(f"unified-view checkpoints with {named} are not supported.")
