"""Checkpoints of He et al.'s code ("Towards a unified view") on BART and mBART.

As on RoBERTa (`unified_view`), tensors of the prefix module begin here with "prefix/", and its last
projections, which cover all layers, are split into one piece per layer ("...2.weight[0]"). Every
method of attention acts at the encoder's attention and at both of the decoder's, every method of
the feed-forward block in both stacks.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from pals_jax.convert import bart, tables
from pals_jax.convert import unified_view_options as options
from pals_jax.convert.tables import Slot, Tensors
from pals_jax.convert.unified_view_options import PREFIX
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck, Prefix, Prompt
from pals_jax.models.adapters.places import Place, places
from pals_jax.models.adapters.spec import Adapter, Method, TaskCopy
from pals_jax.models.bart import BartConfig
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import UserError

MODEL_TYPES = ("bart", "mbart")

_Reads = Literal["block_input", "state", "normalised"]
# The site and the input of an adapter, by attn_option and by ffn_option.
_ATTENTION_ADAPTERS: Mapping[str, tuple[str, _Reads]] = {
    "parallel": ("attention.heads", "block_input"),
    "sequential": ("attention.projection", "state"),
}
_FFN_ADAPTERS: Mapping[str, tuple[str, _Reads]] = {
    "parallel": ("ffn.output", "block_input"),
    "sequential": ("ffn.output", "state"),
    "pfeiffer": ("ffn.output", "normalised"),
}
_LORA = {"attention": ("query", "value"), "ffn": ("ffn_in", "ffn_out")}  # targets, by block
_LORA_SITES = {methods.LORA_SITES[target] for targets in _LORA.values() for target in targets}
# Each attention by (block, attention): its module in a layer, and in the prefix module what the
# names of the network's two parts, and of the flat tables, have before and behind.
_MODULES = {
    ("encoder", "self"): ("self_attn", "_enc", "encoder_attn"),
    ("decoder", "self"): ("self_attn", "", "decoder_self_attn"),
    ("decoder", "cross"): ("encoder_attn", "2", "decoder_cross_attn"),
}


def read(
    config: Mapping[str, Any], state_dict: Tensors, prefix_state: Tensors
) -> tuple[Seq2SeqModel, dict[str, Any]]:
    """See `unified_view.from_unified_view`."""
    architecture = BartConfig.from_mapping(config)
    model = Seq2SeqModel(architecture, method=_at_attention(config) + _at_ffn(config))
    named = {f"{PREFIX}{name}": tensor for name, tensor in prefix_state.items()}
    return model, bart.read(
        model,
        slots(model),
        {**state_dict, **cut(named, architecture)},
        source="the unified-view checkpoint",
        may_ignore=_left_overs(config, architecture),
    )


def write(
    model: Seq2SeqModel, variables: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """See `unified_view.to_unified_view`.

    The prefix module is for as many layers as the encoder has; those beyond the decoder's are zero.
    """
    if model.config.model_type not in MODEL_TYPES or model.num_tasks > 1:
        raise UserError("a unified-view checkpoint can hold only one task, on a BART or mBART.")
    if copies := [part for part in model.method if isinstance(part, TaskCopy)]:
        raise _no_place(copies[0])
    for site in ("attention.", "ffn."):
        here = [x for x in model.method if isinstance(x, Adapter) and x.site.startswith(site)]
        if len(here) > 1 and not all(map(methods.is_lora, here)):
            raise _no_place(here[-1])
    tensors = tables.write(variables, slots(model))
    prefix = {name: x for name, x in tensors.items() if name.startswith(PREFIX)}
    state_dict = {name: x for name, x in tensors.items() if name not in prefix}
    depth, joined = model.config.encoder_layers, {}
    for name, pieces in tables.gathered(prefix).items():
        unused = depth - len(pieces) if _of_all_layers(name) else 0
        whole = np.concatenate([*pieces, *[np.zeros_like(pieces[0])] * unused])
        joined[name.removeprefix(PREFIX)] = whole
    return state_dict, joined


# ------------------------------------------------ their options as methods


def _at_attention(config: Mapping[str, Any]) -> Method:
    mode, option, size = config["attn_mode"], config["attn_option"], config["attn_bn"]
    if mode == "none":
        return ()
    if mode == "bitfit":
        return methods.bitfit()
    if mode == "prompt_tuning":
        return methods.prompt_tuning(size)
    if mode == "lora":
        return options.lora(config, size, _LORA["attention"])
    if mode == "adapter" and option in _ATTENTION_ADAPTERS:
        site, reads = _ATTENTION_ADAPTERS[option]
        return (Adapter("attention_adapter", site, Bottleneck(size, "relu", norm=True), reads),)
    if mode in ("prefix", "prefix_nomlp"):
        bottleneck = config["mid_dim"] if mode == "prefix" else 0
        return _prefix(config, size, bottleneck)
    raise options.not_held(attn_mode=mode, attn_option=option)


def _prefix(config: Mapping[str, Any], length: int, bottleneck: int) -> Method:
    """A prefix; BART's multi-head parallel adapter has queries of its own, mBART's has not."""
    option, composition = config["attn_option"], config["attn_composition"]
    own = config["model_type"] == "bart"
    compose: Literal["gate", "add"] = "add"
    match option, composition:
        case ("concat", "add") | ("cross_attn_noln", "gate_add"):  # two ways to write the same
            form, compose = Prefix(length, bottleneck), "gate"
        case ("cross_attn_noln", "add"):
            form = Prefix(length, bottleneck)
        case ("cross_attn", "add"):
            form = Prefix(length, bottleneck, norm=True)
        case ("cross_attn_relu", "add"):
            form = Prefix(length, bottleneck, "relu", norm=own, scaled=not own)
        case _:
            raise options.not_held(attn_option=option, attn_composition=composition)
    shared = ("embedding", "down") if bottleneck else ()
    return (Adapter("prefix", "attention.heads", form, shared=shared, compose=compose),)


def _at_ffn(config: Mapping[str, Any]) -> Method:
    mode, option, size = config["ffn_mode"], config["ffn_option"], config["ffn_bn"]
    if mode in ("none", "bitfit"):
        return ()
    if mode == "lora":
        return options.lora(config, size, _LORA["ffn"])
    pfeiffer_on_bart = (config["model_type"], option) == ("bart", "pfeiffer")  # fails there as well
    if mode != "adapter" or option not in _FFN_ADAPTERS or pfeiffer_on_bart:
        raise options.not_held(ffn_mode=mode, ffn_option=option)
    norm, init = config["ffn_adapter_layernorm_option"], config["ffn_adapter_init_option"]
    scale = options.scale(config["ffn_adapter_scalar"])
    site, reads = _FFN_ADAPTERS[option]
    if norm == "out" and scale != "learned":
        form = Bottleneck(size, "relu", init, out_norm=scale)
        return (Adapter("ffn_adapter", site, form, reads),)
    if norm not in ("none", "in"):
        raise options.not_held(ffn_adapter_layernorm_option=norm, ffn_adapter_scalar=scale)
    form = Bottleneck(size, "relu", init, norm=norm == "in")
    return (Adapter("ffn_adapter", site, form, reads, scale=scale),)


# ------------------------------------------------ their names


def slots(model: Seq2SeqModel) -> Iterator[Slot]:
    """The table of names: the model under Hugging Face's names, then the task's parameters."""
    yield from bart.bart(model.config)
    for block, stack in model.config.stacks.items():
        for place in places(model.method, block):
            adapter = place.part
            if adapter in methods.bitfit():  # copies of the model's own biases
                continue
            if not isinstance(adapter, Adapter) or adapter.layers != "all":
                raise _no_place(adapter)
            yield from _outside_layers(place, adapter)
            for layer in range(stack.num_hidden_layers):
                yield from _of_layer(place, adapter, layer)


def _outside_layers(place: Place, adapter: Adapter) -> Iterator[Slot]:
    path = ("adapters", place.name, "shared")
    match adapter:
        case Adapter(form=Prompt()):
            yield Slot("model.encoder.ef_prefix_emb.weight", (*path, "embedding"), (0,))
        case Adapter(form=Prefix(), shared=("embedding", "down")):
            _, suffix, _ = _MODULES[place.block, place.attention]
            yield Slot(f"{PREFIX}wte{suffix}.weight", (*path, "embedding"), (0,))
            yield from tables.dense(f"{PREFIX}control_trans{suffix}.0", (*path, "down"), (0,))


def _of_layer(place: Place, adapter: Adapter, layer: int) -> Iterator[Slot]:
    """The slots of a place in one layer; an error if their options cannot express it."""
    name, path, index = f"model.{place.block}.layers.{layer}", _path(place), (0, layer)
    match adapter:
        case Adapter(form=Prompt()):
            pass
        case Adapter(form=Prefix() as form, scale=1.0):
            module, suffix, flat = _MODULES[place.block, place.attention]
            if form.bottleneck:
                last = f"{PREFIX}control_trans{suffix}.2"
                yield from tables.dense(last, (*path, "up"), index, f"[{layer}]")
            else:
                for part in ("key", "value"):
                    yield Slot(f"{PREFIX}{flat}_{part}.{layer}.weight", (*path, part), index)
            if form.norm:
                theirs = f"{name}.{module}.ef_transform_layer_norm"
                yield from tables.norm(theirs, (*path, "norm"), index)
        case Adapter() if methods.is_lora(adapter) and adapter.site in _LORA_SITES:
            yield from tables.lora(f"{name}.{bart.MODULES[place.site]}.ef_lora_", path, index)
        case Adapter(form=Bottleneck(activation="relu", bias=True) as form, compose="add"):
            module = _module(place, adapter, form)
            yield from _adapter(f"{name}.{module}", path, index, adapter, form)
        case _:
            raise _no_place(adapter)


def _module(place: Place, adapter: Adapter, form: Bottleneck) -> str:
    """The module of a bottleneck adapter; attention adapters have a layer norm and no scale."""
    where = adapter.site, adapter.reads
    if where in _FFN_ADAPTERS.values():
        return "ef_ffn_adapter"
    if where in _ATTENTION_ADAPTERS.values() and form.norm and adapter.scale == 1.0:
        return f"{_MODULES[place.block, place.attention][0]}.ef_attn_adapter"
    raise _no_place(adapter)


def _adapter(
    name: str, path: tables.Path, index: tuple[int, int], adapter: Adapter, form: Bottleneck
) -> Iterator[Slot]:
    """The slots of a bottleneck adapter in one layer, their `Adapter_Layer`."""
    yield from tables.dense(f"{name}.down_proj", (*path, "down"), index)
    yield from tables.dense(f"{name}.up_proj", (*path, "up"), index)
    for norm, used in (("norm", form.norm), ("out_norm", form.out_norm is not None)):
        if used:  # one name in their code for both
            yield from tables.norm(f"{name}.adapter_layer_norm_before", (*path, norm), index)
    if adapter.scale == "learned":  # their scale has shape [1], ours is a scalar
        task, layer = index
        yield Slot(f"{name}.scale", (*path, "scale"), (task, slice(layer, layer + 1)))


def _path(place: Place) -> tables.Path:
    return ("adapters", place.name, "layers")


def _no_place(part: Adapter | TaskCopy) -> UserError:
    return UserError(
        f"a unified-view checkpoint cannot hold {part.name!r}; it holds one kind of change at"
        " attention and one at the feed-forward block, on all layers, within the authors' options."
    )


def _left_overs(config: Mapping[str, Any], architecture: BartConfig) -> str:
    """A pattern of tensors that the original stores but does not use."""
    names = ["$^"]
    unused = range(architecture.decoder_layers, architecture.encoder_layers)
    if layers := "|".join(map(str, unused)):
        names.append(rf"{PREFIX}control_trans2?\.2\.(weight|bias)\[({layers})\]")
        names.append(rf"{PREFIX}decoder_(self|cross)_attn_(key|value)\.({layers})\.")
    if config["model_type"] == "mbart" and config["attn_option"] == "cross_attn_relu":
        names.append(r"model\..*\.ef_transform_layer_norm\.")
    return "|".join(names)


def cut(prefix: Tensors, architecture: BartConfig) -> dict[str, np.ndarray]:
    """The prefix module's tensors, with the last projections split into one piece per layer."""
    pieces: dict[str, np.ndarray] = {}
    for name, tensor in prefix.items():
        of_layers = np.array_split(tensor, architecture.encoder_layers)
        pieces |= tables.cut(name, of_layers) if _of_all_layers(name) else {name: tensor}
    return pieces


def _of_all_layers(name: str) -> bool:
    """Whether a tensor is of a last projection of the prefix module."""
    return bool(re.match(rf"{PREFIX}control_trans(_enc|2)?\.2\.", name))
