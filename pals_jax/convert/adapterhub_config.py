"""Conversion between configurations of AdapterHub's library (`adapters`) and methods.

Each of their architectures has one function per direction, and a table of options for which only
one value is supported; exported configurations have these values as well.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck, Prefix, Scale
from pals_jax.models.adapters.spec import ATTENTIONS, Adapter, Layers, Method, TaskCopy
from pals_jax.models.architectures import Architecture
from pals_jax.models.bart import BartConfig
from pals_jax.runtime.errors import UserError

_BOTTLENECK = {
    "use_gating": False,
    "ln_before": False,
    "ln_after": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "phm_layer": False,
    "dropout": 0.0,
    "stochastic_depth": 0.0,
}
_PREFIX = {
    **{"encoder_prefix": True, "cross_prefix": True},
    **{"non_linearity": "tanh", "dropout": 0.0, "use_gating": False},
}
_LORA = {"use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None}
_IA3 = _LORA | {"alpha": 1, "r": 1, "dropout": 0.0}
# The common names of options, for error messages.
_KNOWN_AS = {
    "phm_layer": "Compacter",
    "inv_adapter": "invertible adapters",
    "use_gating": "gates, as in UniPELT",
    "use_dora": "DoRA",
    "vera_d": "VeRA",
}

_SITES = {"mh_adapter": "attention.output", "output_adapter": "ffn.output"}
_CROSS = "cross_adapter"  # of BART: the site of mh_adapter, at the cross attention
_ACTIVATIONS = {  # theirs -> ours, where the names differ
    "linear": "identity",
    "silu": "swish",
}
_INITS = {"bert": "bert", "mam_adapter": "lora", "houlsby": "near_identity"}
_MATRICES = {"q": "query", "k": "key", "v": "value"}
# The options that turn LoRA on outside self-attention.
_OUTSIDE = {"intermediate_lora": "ffn_in", "output_lora": "ffn_out"}


# ------------------------------------------------ in


def read_method(config: Mapping[str, Any], of: Architecture) -> Method:
    """The method that a configuration describes.

    Args:
        config: the "config" entry of an `adapter_config.json`.
        of: the architecture of the model.

    Raises:
        UserError: if the method is not supported, or options are missing or invalid.
    """
    architecture = config.get("architecture")
    try:
        if architecture == "union":
            return tuple(a for part in config["configs"] for a in read_method(part, of))
        if architecture in (None, "bottleneck"):
            method = _bottleneck(config, of)
        elif architecture == "prefix_tuning":
            method = _prefix(config)
        elif architecture == "lora" and config.get("composition_mode") == "scale":
            method = _ia3(config)
        elif architecture == "lora":
            method = _lora(config)
        else:
            raise UserError(
                f"adapters of the architecture {architecture!r} are not supported; supported are"
                " bottleneck adapters, prefix tuning, LoRA, IA3 and their unions."
            )
    except KeyError as error:
        raise UserError(f"the adapter's configuration lacks {error}.") from error
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"the adapter's configuration is invalid: {error}.") from error
    layers = _layers(config, of)
    return tuple(dataclasses.replace(adapter, layers=layers) for adapter in method)


def _bottleneck(config: Mapping[str, Any], of: Architecture) -> Method:
    _check(config, _BOTTLENECK)
    factor = config["reduction_factor"]
    if isinstance(factor, Mapping):
        raise UserError("a separate reduction_factor for each layer is not supported.")
    size = max(1, int(of.stacks["encoder"].hidden_size // factor))
    activation = config["non_linearity"].lower()
    init = _INITS.get(config.get("init_weights", "bert"), "bert")
    form = Bottleneck(size, _ACTIVATIONS.get(activation, activation), init)
    reads: Literal["block_input", "state", "normalised"] = "state"
    if config.get("is_parallel"):
        reads = "block_input"
    elif config.get("original_ln_before"):
        reads = "normalised"
    scale, found = config.get("scaling", 1.0), []
    for option, name, attention in (
        ("mh_adapter", "attention_adapter", _attentions(config, of)),
        ("output_adapter", "ffn_adapter", ATTENTIONS if config["output_adapter"] else ()),
    ):
        if attention:
            site = _SITES[option]
            found.append(Adapter(name, site, form, reads, scale=scale, attention=attention))
    return tuple(found)


def _attentions(config: Mapping[str, Any], of: Architecture) -> tuple[str, ...]:
    """At which attentions there are bottleneck adapters; an encoder has only one."""
    if not isinstance(of, BartConfig):
        return ATTENTIONS if config["mh_adapter"] else ()
    options = {"self": config["mh_adapter"], "cross": config.get(_CROSS, False)}
    return tuple(attention for attention in ATTENTIONS if options[attention])


def _prefix(config: Mapping[str, Any]) -> Method:
    _check(config, _PREFIX)
    bottleneck = 0 if config["flat"] else config["bottleneck_size"]
    return methods.prefix_tuning(config["prefix_length"], bottleneck)


def _lora(config: Mapping[str, Any]) -> Method:
    _check(config, _LORA)
    return methods.lora(config["r"], config["alpha"], _targets(config), config["dropout"])


def _ia3(config: Mapping[str, Any]) -> Method:
    """Their IA3 scales the same projections as LoRA; the FFN expansion before its activation."""
    _check(config, _IA3)
    return tuple(
        Adapter(f"ia3_{name}", methods.LORA_SITES[name], Scale(), compose="multiply")
        for name in _targets(config)
    )


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    attention = config["attn_matrices"] if config["selfattn_lora"] else ()
    outside = [name for option, name in _OUTSIDE.items() if config[option]]
    return (*(_MATRICES[matrix] for matrix in _MATRICES if matrix in attention), *outside)


def _layers(config: Mapping[str, Any], of: Architecture) -> Layers:
    out, depth = config.get("leave_out") or (), of.stacks["encoder"].num_hidden_layers
    if out and isinstance(of, BartConfig):
        raise UserError(f"leave_out={out} is not supported on an encoder-decoder.")
    layers = tuple(layer for layer in range(depth) if layer not in out)
    if not layers:
        raise UserError(f"leave_out={out} leaves none of the encoder's {depth} layers.")
    return layers if out else "all"


def _check(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for option, value in fixed.items():
        given = config.get(option, value)
        if given != value:
            known_as = f" ({_KNOWN_AS[option]})" if option in _KNOWN_AS else ""
            raise UserError(
                f"adapters with {option}={given!r}{known_as} are not supported, only {value!r}."
            )


# ------------------------------------------------ out


def write_method(method: Method, of: Architecture) -> dict[str, Any]:
    """The configuration of a method: the "config" entry of an `adapter_config.json`.

    Raises:
        UserError: if the library does not have the method.
    """
    depth = of.stacks["encoder"].num_hidden_layers
    groups: dict[Any, list[Any]] = {}
    for spec in method:
        groups.setdefault(_group(spec, depth), []).append(spec)
    configs = []
    for (architecture, layers, *_), adapters in groups.items():
        config = _WRITERS[architecture](adapters[0].form, adapters, of)
        configs.append(config | {"leave_out": sorted(set(range(depth)) - set(layers))})
    config = configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}
    claims = [claim for part in configs for claim in _claims(part)]
    # Reading the result back must give the same method; otherwise the format cannot express it.
    try:
        changed = _bare(read_method(config, of), depth) != _bare(method, depth)
    except UserError as error:
        raise _no_place(method) from error
    if changed or not claims or len(set(claims)) < len(claims):
        raise _no_place(method)
    return config


def _group(spec: Adapter | TaskCopy, depth: int) -> tuple[Any, ...]:
    """A key that is equal for specs which one configuration can hold together."""
    match spec:
        case Adapter(form=Prefix()):
            architecture = "prefix_tuning"
        case Adapter(form=Scale()):
            architecture = "ia3"
        case Adapter(form=Bottleneck()) if spec.site in _SITES.values():
            architecture = "bottleneck"
        case Adapter(form=Bottleneck(), scale=int() | float()):
            architecture = "lora"
        case _:
            raise _no_place((spec,))
    return architecture, spec.layer_indices(depth), spec.form, spec.reads, spec.scale


def _write_bottleneck(
    form: Bottleneck, adapters: Sequence[Adapter], of: Architecture
) -> dict[str, Any]:
    sites = {adapter.site: adapter for adapter in adapters}
    attention = sites[_SITES["mh_adapter"]].attention if _SITES["mh_adapter"] in sites else ()
    two = isinstance(of, BartConfig)
    width, size = of.stacks["encoder"].hidden_size, form.size
    reads, scale = adapters[0].reads, adapters[0].scale
    return {
        **_BOTTLENECK,
        **{option: site in sites for option, site in _SITES.items()},
        **({"mh_adapter": "self" in attention, _CROSS: "cross" in attention} if two else {}),
        # They compute width // factor; size + 0.5 keeps the quotient away from rounding errors.
        "reduction_factor": width / (size + 0.5) if width % size else width // size,
        "non_linearity": _theirs(_ACTIVATIONS, form.activation) or form.activation,
        "init_weights": _theirs(_INITS, form.init) or "bert",  # of no effect on trained ones
        "is_parallel": reads == "block_input",
        "original_ln_before": reads == "normalised",
        "scaling": scale if scale == "learned" else float(scale),
    }


def _write_prefix(form: Prefix, adapters: Sequence[Adapter], of: Architecture) -> dict[str, Any]:
    return {
        **_PREFIX,
        "architecture": "prefix_tuning",
        "prefix_length": form.length,
        "flat": not form.bottleneck,
        **({"bottleneck_size": form.bottleneck} if form.bottleneck else {}),
    }


def _write_lora(form: Bottleneck, adapters: Sequence[Adapter], of: Architecture) -> dict[str, Any]:
    alpha = float(adapters[0].scale) * form.size
    return {
        **_LORA,
        **_write_targets(adapters),
        "composition_mode": "add",
        "init_weights": "lora",
        "r": form.size,
        "alpha": round(alpha, 9),  # so that alpha / r reproduces the scale exactly
        "dropout": form.dropout,
    }


def _write_ia3(form: Scale, adapters: Sequence[Adapter], of: Architecture) -> dict[str, Any]:
    mode = {"composition_mode": "scale", "init_weights": "ia3"}
    return {**_IA3, **_write_targets(adapters), **mode}


def _write_targets(adapters: Sequence[Adapter]) -> dict[str, Any]:
    sites = {adapter.site for adapter in adapters}
    matrices = [m for m, name in _MATRICES.items() if methods.LORA_SITES[name] in sites]
    outside = {option: methods.LORA_SITES[name] in sites for option, name in _OUTSIDE.items()}
    attention = {"attn_matrices": matrices, "selfattn_lora": bool(matrices)}
    return {"architecture": "lora"} | attention | outside


_WRITERS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "bottleneck": _write_bottleneck,
    "prefix_tuning": _write_prefix,
    "lora": _write_lora,
    "ia3": _write_ia3,
}


def _theirs(names: Mapping[str, str], ours: str | float) -> str | None:
    return next((theirs for theirs, name in names.items() if name == ours), None)


def _claims(config: Mapping[str, Any]) -> list[str]:
    """The architecture or sites that at most one configuration of a union may have."""
    if "architecture" in config:
        return [config["architecture"]]
    return [option for option in (*_SITES, _CROSS) if config.get(option)]


def _bare(method: Method, depth: int) -> Counter[Any]:
    """The method for comparison: without names, order or scale values, layers as indices."""
    return Counter(
        dataclasses.replace(
            spec,
            name="",
            layers=spec.layer_indices(depth),
            scale="learned" if spec.scale == "learned" else 1.0,
        )
        for spec in method
        if isinstance(spec, Adapter)
    )


def _no_place(method: Method) -> UserError:
    names = ", ".join(spec.name for spec in method) or "a method without adapters"
    return UserError(
        f"AdapterHub cannot hold {names}; it has bottleneck adapters after or parallel to"
        " attention and feed-forward, gated prefixes, LoRA on query, key, value and feed-forward,"
        " and IA3 factors on these projections."
    )
