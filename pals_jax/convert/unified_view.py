"""Import and export of checkpoints of He et al.'s code ("Towards a unified view") on RoBERTa.

Those on BART and mBART: `unified_view_seq2seq`.

A checkpoint has two parts: the encoder, with task parameters in tensors named ef_..., and the
prefix module. In the tables here, names in the prefix module begin with "prefix/", and its last
projection, which covers all layers, is split into one piece per layer ("...2.weight[0]").
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from pals_jax.convert import tables, unified_view_seq2seq
from pals_jax.convert import unified_view_options as options
from pals_jax.convert.tables import Slot, Tensors
from pals_jax.convert.unified_view_options import PREFIX
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck, Prefix
from pals_jax.models.adapters.spec import Adapter, Method, TaskCopy
from pals_jax.models.architectures import Model
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import UserError


class Place(NamedTuple):
    """An adapter's site, its input, and its module name within their layer."""

    site: str
    reads: Literal["block_input", "state", "normalised"]
    name: str


# Keyed by attn_option; "sequential" comes before dropout. Both apply a layer norm first.
_ATTENTION_ADAPTERS = {
    "parallel": Place("attention.heads", "block_input", "attention.self.ef_attn_adapter"),
    "sequential": Place("attention.projection", "state", "attention.output.ef_attn_adapter"),
}
# Keyed by ffn_option.
_FFN_ADAPTERS = {
    "parallel": Place("ffn.output", "block_input", "ef_ffn_adapter"),
    "sequential": Place("ffn.output", "state", "output.ef_ffn_adapter"),
    "pfeiffer": Place("ffn.output", "normalised", "output.ef_ffn_adapter"),
}
# Keyed by attn_option: the activation of attention scores, and the composition.
_PREFIXES: Mapping[str, tuple[str, Literal["gate", "add"]]] = {
    "concat": ("softmax", "gate"),
    "cross_attn_noln": ("softmax", "add"),
    "cross_attn_relu": ("relu", "add"),
}
_LORA = {"attention": ("query", "value"), "ffn": ("ffn_in", "ffn_out")}  # targets, by block
_LORA_SITES = {methods.LORA_SITES[target] for targets in _LORA.values() for target in targets}

_LAST = f"{PREFIX}control_trans.2"  # layer by layer: keys, then values
_SHARED = ("embedding", "down")  # the parts of the prefix network that all layers share


def from_unified_view(
    config: Mapping[str, Any], state_dict: Tensors, prefix_state: Tensors
) -> tuple[Any, dict[str, Any]]:
    """The model (T = 1) and variables of an original checkpoint; a head is new.

    Parameters that the original stores but does not use are ignored: encoder-decoder prefixes, the
    layer norm of the multi-head parallel adapter, the second copy of a parallel adapter. LoRA's
    dropout rate is kept; dropout inside adapters and on prefixes is not.

    Args:
        config: the `config.json` of a RoBERTa, BART or mBART with the authors' options
            (`attn_mode`, `attn_option`, `attn_bn`, `ffn_mode`, ...), and optionally, of a RoBERTa,
            `labels`: a list with the task's number of classes, 1 for regression; 2 if absent.
        state_dict: the tensors of the encoder ("encoder.layer.0...", "pooler.dense.weight") or of
            the encoder-decoder ("model.encoder.layers.0..."), with LoRA unmerged.
        prefix_state: the tensors of the prefix module ("wte.weight", "control_trans.0.weight", or
            "decoder_self_attn_key.0.weight"); empty if there is none.

    Raises:
        UserError: if options are not supported, or tensors do not fit; every problem is listed.
    """
    options.check(config)
    if config.get("model_type") in unified_view_seq2seq.MODEL_TYPES:
        return unified_view_seq2seq.read(config, state_dict, prefix_state)
    labels = tuple(config.get("labels", (2,)))
    if len(labels) != 1:
        raise UserError(f"a unified-view checkpoint has one task, but labels has {len(labels)}.")
    architecture = BertConfig.from_mapping(
        {"pad_token_id": 1} | dict(config) | {"model_type": "roberta"}
    )
    model = MultiTaskModel(architecture, labels, _at_attention(config) + _at_ffn(config))
    named = {f"{PREFIX}{name}": tensor for name, tensor in prefix_state.items()}
    return model, tables.read(
        model,
        unified_view_slots(model),
        {**state_dict, **_cut(named, architecture.num_hidden_layers)},
        source="the unified-view checkpoint",
        may_ignore=_left_overs(config),
    )


def to_unified_view(
    model: Model, variables: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of the encoder and of the prefix module under their original names.

    A head, and tensors that the original stores but does not use, are left out.

    Raises:
        UserError: if the original format cannot hold the model.
    """
    if isinstance(model, Seq2SeqModel):
        return unified_view_seq2seq.write(model, variables)
    if model.config.model_type != "roberta" or len(model.num_outputs) > 1:
        raise UserError("a unified-view checkpoint can hold only one task, on a RoBERTa.")
    for block in ("attention", "ffn"):
        here = [x for x in model.method if isinstance(x, Adapter) and x.site.startswith(block)]
        # Only LoRA may have two adapters in a block, one per projection.
        if len(here) > max(1, len({x.site for x in here} & _LORA_SITES)):
            raise _no_place(here[-1])
    tensors = tables.write(variables, unified_view_slots(model))
    prefix = {name: x for name, x in tensors.items() if name.startswith(PREFIX)}
    state_dict = {name: x for name, x in tensors.items() if name not in prefix}
    joined = {name: np.concatenate(pieces) for name, pieces in tables.gathered(prefix).items()}
    return state_dict, {name.removeprefix(PREFIX): x for name, x in joined.items()}


# ------------------------------------------------ their options as methods


def _at_attention(config: Mapping[str, Any]) -> Method:
    mode, option, size = config["attn_mode"], config["attn_option"], config["attn_bn"]
    if mode == "none":
        return ()
    if config["attn_composition"] != "add":  # the original code fails on these as well
        raise options.not_held(attn_composition=config["attn_composition"])
    if mode == "lora":
        return options.lora(config, size, _LORA["attention"])
    if mode == "adapter" and option in _ATTENTION_ADAPTERS:
        site, reads, _ = _ATTENTION_ADAPTERS[option]
        return (Adapter("attention_adapter", site, Bottleneck(size, "relu", norm=True), reads),)
    if mode in ("prefix", "prefix_nomlp") and option in _PREFIXES:
        if option != "concat" and config.get("layer_norm_after"):
            raise options.not_held(layer_norm_after=True)
        activation, compose = _PREFIXES[option]
        form = Prefix(size, config["mid_dim"] if mode == "prefix" else 0, activation)
        shared = _SHARED if form.bottleneck else ()
        return (Adapter("prefix", "attention.heads", form, shared=shared, compose=compose),)
    raise options.not_held(attn_mode=mode, attn_option=option)


def _at_ffn(config: Mapping[str, Any]) -> Method:
    mode, option, size = config["ffn_mode"], config["ffn_option"], config["ffn_bn"]
    if mode == "none":
        return ()
    if mode == "lora":
        return options.lora(config, size, _LORA["ffn"])
    if mode == "adapter" and option in _FFN_ADAPTERS:
        norm, scale = config["ffn_adapter_layernorm_option"], config["ffn_adapter_scalar"]
        if norm not in ("none", "in"):
            raise options.not_held(ffn_adapter_layernorm_option=norm)
        init = config["ffn_adapter_init_option"]
        form = Bottleneck(size, "relu", init, norm=norm == "in")
        site, reads, _ = _FFN_ADAPTERS[option]
        return (Adapter("ffn_adapter", site, form, reads, scale=options.scale(scale)),)
    raise options.not_held(ffn_mode=mode, ffn_option=option)


# ------------------------------------------------ their names


def unified_view_slots(model: MultiTaskModel) -> Iterator[Slot]:
    """The table of names: the encoder under Hugging Face's names, then the task's parameters."""
    yield from tables.bert(model.config)
    for spec in model.method:
        for layer in range(model.config.num_hidden_layers):
            yield from _layer_slots(f"encoder.layer.{layer}", spec, layer)
        if isinstance(spec, Adapter) and spec.shared:
            path = ("adapters", spec.name, "shared")
            yield Slot(f"{PREFIX}wte.weight", (*path, "embedding"), (0,))
            yield from tables.dense(f"{PREFIX}control_trans.0", (*path, "down"), (0,))


def _layer_slots(name: str, spec: Adapter | TaskCopy, layer: int) -> Iterator[Slot]:
    """The slots of a spec in one layer; an error if their options cannot express it."""
    path, index = ("adapters", spec.name, "layers"), (0, layer)
    match spec:
        case Adapter(form=Prefix(bottleneck=0), layers="all", shared=(), scale=1.0):
            for part in ("key", "value"):
                theirs = f"{PREFIX}decoder_self_attn_{part}.{layer}.weight"
                yield Slot(theirs, (*path, part), index)
        case Adapter(form=Prefix(), layers="all", shared=("embedding", "down"), scale=1.0):
            yield from tables.dense(_LAST, (*path, "up"), index, f"[{layer}]")
        case Adapter(form=Bottleneck() as form, layers="all", shared=(), compose="add"):
            if methods.is_lora(spec) and spec.site in _LORA_SITES:
                module = f"{name}.{tables.MODULES[spec.site]}"
                yield from tables.lora(f"{module}.ef_lora_", path, index)
            else:
                yield from _adapter_slots(f"{name}.{_place(spec, form).name}", spec, form, layer)
        case _:
            raise _no_place(spec)


def _place(adapter: Adapter, form: Bottleneck) -> Place:
    """The place of a bottleneck adapter; attention adapters have a layer norm and no scale."""
    places = list(_FFN_ADAPTERS.values())
    if form.norm and adapter.scale == 1.0:
        places += _ATTENTION_ADAPTERS.values()
    if form.activation == "relu" and form.bias:
        for place in places:
            if (place.site, place.reads) == (adapter.site, adapter.reads):
                return place
    raise _no_place(adapter)


def _adapter_slots(name: str, adapter: Adapter, form: Bottleneck, layer: int) -> Iterator[Slot]:
    """The slots of a bottleneck adapter in one layer, their `Adapter_Layer`."""
    path, index = ("adapters", adapter.name, "layers"), (0, layer)
    yield from tables.dense(f"{name}.down_proj", (*path, "down"), index)
    yield from tables.dense(f"{name}.up_proj", (*path, "up"), index)
    if form.norm:
        yield from tables.norm(f"{name}.adapter_layer_norm_before", (*path, "norm"), index)
    if adapter.scale == "learned":  # their scale has shape [1], ours is a scalar
        yield Slot(f"{name}.scale", (*path, "scale"), (0, slice(layer, layer + 1)))


def _no_place(spec: Adapter | TaskCopy) -> UserError:
    return UserError(
        f"a unified-view checkpoint cannot hold {spec.name!r}; it holds one kind of change at"
        " attention and one at the feed-forward block, on all layers, within the authors' options."
    )


def _left_overs(config: Mapping[str, Any]) -> str:
    """A pattern of tensors that the original stores but does not use."""
    names = [r"embeddings\.position_ids$"]  # a buffer
    if config["attn_mode"] == "prefix":
        names.append(rf"{PREFIX}(wte|control_trans)(_enc|2)\.")
    if config["attn_mode"] == "prefix_nomlp":
        names.append(rf"{PREFIX}(encoder_attn|decoder_cross_attn)_(key|value)\.")
    if "prefix" in config["attn_mode"] and config["attn_option"] == "cross_attn_relu":
        names.append(r"encoder\.layer\.\d+\.attention\.self\.ef_transform_layer_norm\.")
    if config["ffn_mode"] == "adapter" and config["ffn_option"] == "parallel":
        names.append(r"encoder\.layer\.\d+\.output\.ef_ffn_adapter\.")
    return "|".join(names)


def _cut(prefix: Tensors, depth: int) -> dict[str, np.ndarray]:
    """The prefix module's tensors, with the last projection split into one piece per layer."""
    pieces = dict(prefix)
    for name in (f"{_LAST}.weight", f"{_LAST}.bias"):
        if name in prefix:
            pieces |= tables.cut(name, np.array_split(pieces.pop(name), depth))
    return pieces
