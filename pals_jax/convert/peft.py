"""Import and export of LoRA in the format of Hugging Face's PEFT.

On an encoder it is for sequence classification, on an encoder-decoder for generation. A directory
holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), without the model. The
tensors' names tell which projections of which layers have LoRA.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pals_jax.convert import huggingface, stacking, tables, tensor_files
from pals_jax.convert.stacking import Part
from pals_jax.convert.tables import Slot, Tensors
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.places import Place, places
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.architectures import Architecture, Model, num_tasks
from pals_jax.models.bart import BartConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.task_rows import check_task_ids
from pals_jax.runtime.errors import UserError

_SAFETENSORS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# Options that are supported, or do not affect the computation. Any other option, including ones
# that PEFT adds later, could change the computation, so it must be off.
_OPTIONS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "task_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"),
    *("init_lora_weights", "eva_config", "qalora_group_size", "megatron_core"),
    "ensure_weight_tying",
}
# Options with restricted values. Other values of init_lora_weights also change the encoder.
_VALUES: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_ENCODER_TYPES = (None, "SEQ_CLS", "FEATURE_EXTRACTION")
_ENCODER_DECODER_TYPES = (None, "SEQ_2_SEQ_LM")
_HEADS = {"classifier", "score"}  # PEFT's names for a sequence classifier's head


def from_peft(
    base_dir: str | Path, adapters: Mapping[str, str | Path]
) -> tuple[Any, dict[str, Any]]:
    """A model with one task per adapter, in the given order, on one encoder or encoder-decoder.

    A classifier saved with the LoRA becomes the task's head; on RoBERTa its first layer becomes a
    task-specific pooler. Without a saved classifier, the head is new and has two outputs.

    Args:
        base_dir: the model that the adapters were trained on; a directory, a hub id, or anything
            else that `from_huggingface` accepts.
        adapters: maps each task name to a directory with `adapter_config.json` and
            `adapter_model.safetensors` or `adapter_model.bin`; the latter needs PyTorch.

    Returns:
        A `MultiTaskModel` or a `Seq2SeqModel`, and its variables {"params", "adapters"} with
        float32 leaves.

    Raises:
        UserError: if options are not supported, adapters differ in rank or targets, a file is
            damaged, or tensors do not fit; every problem is listed.
    """
    return stacking.stack(base_dir, adapters, (_SAFETENSORS, _PICKLE), _read_part)


def to_peft(model: Model, variables: Mapping[str, Any], task: int, directory: str | Path) -> None:
    """Writes one task's LoRA in PEFT's format, with its head for a sequence classifier.

    Args:
        model: the model.
        variables: the model's variables.
        task: the index of the task.
        directory: the output directory, created if missing.

    Raises:
        UserError: if there is no such task, or PEFT's LoRA cannot express the method.
    """
    check_task_ids(num_tasks(model), task)
    loras, has_head = _loras(model), isinstance(model, MultiTaskModel)
    form, scale = loras[0].form, loras[0].scale
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else "SEQ_2_SEQ_LM",
        "r": form.size,
        "lora_alpha": round(scale * form.size, 9),  # so that alpha / r reproduces the scale
        "lora_dropout": form.dropout,
        # Full names: PEFT matches suffixes, and "output.dense" ends "attention.output.dense" too.
        "target_modules": [
            huggingface.module(model.config, place, layer)
            for place in _places(loras, model.config)
            for layer in _layers(model.config, place)
        ],
        "modules_to_save": ["classifier"] if has_head else None,
        "bias": "none",
        "inference_mode": True,
    }

    def nested(name: str) -> str:
        within = has_head and not name.startswith("classifier.")
        encoder = f"{model.config.model_type}." if within else ""
        return f"base_model.model.{encoder}{name}"

    tensors = tables.write(variables, tables.renamed(peft_slots(model, task), nested))
    tensor_files.write_adapter(Path(directory), config, _SAFETENSORS, tensors)


def has_head(directory: Path) -> bool:
    """Whether a classifier was saved with the LoRA."""
    tensors = tensor_files.find_tensors(directory, _SAFETENSORS, _PICKLE)
    return any(set(name.split(".")) & _HEADS for name in tensors)


def _read_part(config: Mapping[str, Any], tensors: Tensors, of: Architecture) -> Part:
    types = _ENCODER_DECODER_TYPES if isinstance(of, BartConfig) else _ENCODER_TYPES
    _check(config, {**_VALUES, "task_type": types})
    method = _method(config, tensors, of)
    if isinstance(of, BartConfig):
        return Part(method, tensors, peft_slots)
    head = "classifier.out_proj" if of.model_type == "roberta" else "classifier"
    if f"{head}.weight" not in tensors:
        return Part(method, tensors, _lora_slots)
    num_outputs = len(tensors[f"{head}.weight"])
    own = methods.pooler() if of.model_type == "roberta" else ()
    return Part(method + own, tensors, peft_slots, num_outputs)


def _check(config: Mapping[str, Any], restricted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses options that would make the adapter something other than plain LoRA."""
    for option, value in config.items():
        if option not in _OPTIONS and value:
            raise UserError(f"PEFT's {option}={value!r} is not supported; train without it.")
    for option, values in restricted.items():
        value = config.get(option, values[0])
        if value not in values:
            names = ", ".join(map(repr, values))
            raise UserError(f"PEFT's {option}={value!r} is not supported, only {names}.")
    if other := set(config.get("modules_to_save") or ()) - _HEADS:
        raise UserError(
            f"PEFT's modules_to_save={sorted(other)} is not supported, only the classifier."
        )


def _method(config: Mapping[str, Any], names: Collection[str], of: Architecture) -> Method:
    """LoRA on the projections for which there are tensors."""
    try:
        rank, alpha, dropout = (config[name] for name in ("r", "lora_alpha", "lora_dropout"))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        loras = methods.lora(rank, alpha, tuple(methods.LORA_SITES), dropout)
    except KeyError as error:
        raise UserError(f"the adapter's configuration lacks {error}.") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"the adapter's configuration is invalid: {error}.") from error
    found: list[Adapter] = []
    for lora in loras:
        adapter = dataclasses.replace(cast(Adapter, lora), scale=scale)
        found += _where(adapter, names, of)
    if not found:
        raise UserError("this directory has no LoRA on any layer of the model.")
    return tuple(found)


def _where(adapter: Adapter, names: Collection[str], of: Architecture) -> list[Adapter]:
    """An adapter where there are tensors: one at all its places if it can be, or one at each."""
    found: dict[Place, Any] = {}
    every = _places([adapter], of)
    for place in every:
        layers = tuple(
            layer
            for layer in _layers(of, place)
            if f"{huggingface.module(of, place, layer)}.lora_A.weight" in names
        )
        if layers:
            found[place] = "all" if layers == _layers(of, place) else layers
    if len(found) == len(every) and len(set(found.values())) == 1:
        return [dataclasses.replace(adapter, layers=found[every[0]])]
    return [
        dataclasses.replace(
            adapter,
            name=f"{adapter.name}_{'cross' if place.attention == 'cross' else place.block}",
            layers=layers,
            blocks=(place.block,),
            attention=(place.attention,),
        )
        for place, layers in found.items()
    ]


def _loras(model: Model) -> list[Any]:
    """The method's adapters; they must be LoRA of one rank and scale, as PEFT requires."""
    loras: list[Any] = []
    others: list[Any] = []
    for spec in model.method:
        if spec == methods.pooler()[0] and model.config.model_type == "roberta":
            continue  # exported as the first layer of RoBERTa's classifier
        (loras if methods.is_lora(spec) else others).append(spec)
    agree = len({(spec.form, spec.scale) for spec in loras}) == 1
    at = [
        (place.block, place.site) for b in model.config.stacks for place in places(tuple(loras), b)
    ]
    if others or not agree or len(set(at)) < len(at):
        names = ", ".join(spec.name for spec in others or model.method) or "no adapter"
        raise UserError(
            f"a PEFT directory cannot hold {names}; it holds LoRA of one rank and scale on"
            " projections of the layers, and the task's head."
        )
    return loras


# ------------------------------------------------ their names


def peft_slots(model: Model, task: int) -> Iterator[Slot]:
    """The table of names of one task's LoRA and head, without the prefixes of outer modules."""
    yield from _lora_slots(model, task)
    if isinstance(model, Seq2SeqModel):
        return
    if model.config.model_type == "bert":
        yield from tables.head("classifier", task, model.num_outputs[task])
        return
    # A RoBERTa classifier is a pooler and a head; our pooler is the encoder's or the task's own.
    own = methods.pooler()[0] in model.method
    ours: tuple[str, ...] = ("adapters", "pooler") if own else ("params", "encoder")
    yield from tables.dense("classifier.dense", (*ours, "pooler", "dense"), (task,) if own else ())
    yield from tables.head("classifier.out_proj", task, model.num_outputs[task])


def _lora_slots(model: Model, task: int) -> Iterator[Slot]:
    for place in _places(_loras(model), model.config):
        path = ("adapters", place.name, "layers")
        for index, layer in enumerate(_layers(model.config, place)):
            name = f"{huggingface.module(model.config, place, layer)}.lora_"
            yield from tables.lora(name, path, (task, index), ".weight")


def _places(loras: Iterable[Adapter], of: Architecture) -> list[Place]:
    return [place for block in of.stacks for place in places(tuple(loras), block)]


def _layers(of: Architecture, place: Place) -> tuple[int, ...]:
    return place.adapter.layer_indices(of.stacks[place.block].num_hidden_layers)
