"""Checkpoints of Stickland & Murray's code (Bert-n-Pals): shared, PALs and low-rank."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pals_jax.convert import tables
from pals_jax.convert.tables import Slot
from pals_jax.errors import UserError
from pals_jax.models import methods
from pals_jax.models.bert import BertConfig
from pals_jax.models.methods import Method
from pals_jax.models.multitask import MultiTaskModel

_LATER_FLAGS = ("houlsby", "top", "bert_lay_top", "lhuc")


def from_bert_n_pals(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """The model and variables of an original checkpoint.

    Args:
        config: the original `bert_config.json` with its flags (`mult`, `pals`, `hidden_size_aug`),
            `num_tasks`, and `labels`: each task's number of classes, 1 for regression.
        state_dict: the original names ("bert.encoder.layer.0...", "classifier.0.weight").

    Raises:
        UserError: a variant that is not held here, or tensors that do not fit; all are listed.
    """
    if missing := {"labels", "hidden_size_aug"} - set(config):
        raise UserError(f"the Bert-n-Pals config lacks {', '.join(sorted(missing))}.")
    model = MultiTaskModel(
        BertConfig.from_mapping(config), tuple(config["labels"]), _method(config)
    )
    slots = bert_n_pals_slots(model)
    return model, tables.read(model, slots, state_dict, source="the Bert-n-Pals checkpoint")


def to_bert_n_pals(model: MultiTaskModel, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors under their original names; also maps gradients, which have the same tree.

    Raises:
        UserError: the original format has no place for adapters on some layers only.
    """
    depth = model.config.num_hidden_layers
    if any(len(adapter.layer_indices(depth)) < depth for adapter in model.method):
        raise UserError("Bert-n-Pals checkpoints hold adapters on all layers or none.")
    return tables.write(variables, bert_n_pals_slots(model))


def _method(config: Mapping[str, Any]) -> Method:
    later = [flag for flag in _LATER_FLAGS if config.get(flag)]
    if later:
        raise UserError(f"Bert-n-Pals checkpoints with {', '.join(later)} are not held here.")
    if not config.get("mult"):
        return methods.shared()
    size = config["hidden_size_aug"]
    if config.get("pals"):
        return methods.pals(size=size)
    return methods.low_rank(size=config.get("extra_dim") or size, activation="gelu")


def bert_n_pals_slots(model: MultiTaskModel) -> Iterator[Slot]:
    """The table of names: the encoder as Hugging Face names it, then what belongs to tasks."""
    old_norm = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old_name(name: str) -> str:
        for new, old in old_norm.items():
            name = name.replace(new, old)
        return f"bert.{name}"

    yield from tables.renamed(tables.bert(model.config), old_name)
    for task, outputs in enumerate(model.num_outputs):
        head = ("adapters", "head")
        columns = slice(outputs)
        yield Slot(
            f"classifier.{task}.weight", (*head, "kernel"), (task, slice(None), columns), True
        )
        yield Slot(f"classifier.{task}.bias", (*head, "bias"), (task, columns))
        for adapter in model.method:
            for place, layer in enumerate(adapter.layer_indices(model.config.num_hidden_layers)):
                name = f"bert.encoder.layer.{layer}.multi_layers.{task}"
                yield from _adapter_slots(name, adapter, task, place)
            if adapter.shared:
                path = ("adapters", adapter.name, "shared")
                yield from tables.dense(
                    f"bert.encoder.mult_aug_dense.{task}", (*path, "down"), (task,)
                )
                yield from tables.dense(
                    f"bert.encoder.mult_aug_dense2.{task}", (*path, "up"), (task,)
                )


def _adapter_slots(name: str, adapter: methods.Adapter, task: int, place: int) -> Iterator[Slot]:
    """One task's adapter in one layer; the original stores shared matrices in every layer again."""
    names = {"down": "aug_dense", "up": "aug_dense2"}
    names |= {attention: f"attn.{attention}" for attention in ("query", "key", "value")}
    for projection in adapter.form.parameters(1, 1, BertConfig()):
        shared = projection in adapter.shared
        path = ("adapters", adapter.name, "shared" if shared else "layers", projection)
        index = (task,) if shared else (task, place)
        yield from tables.dense(f"{name}.{names[projection]}", path, index)
