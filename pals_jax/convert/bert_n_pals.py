"""Import and export of checkpoints of Stickland & Murray's code (Bert-n-Pals)."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pals_jax.convert import tables
from pals_jax.convert.tables import Slot
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

# Maps our parameter names to theirs.
_PROJECTIONS = {"down": "aug_dense", "up": "aug_dense2"}
_PROJECTIONS |= {name: f"attn.{name}" for name in ("query", "key", "value")}
# Maps our sites to the modules that hold a layer's adapters.
_PLACES = {
    "layer": "multi_layers",
    "attention.output": "attention.output.multi_layers",
    "ffn.output": "output.multi_layers",
}


def from_bert_n_pals(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """The model and variables of an original checkpoint.

    Args:
        config: the original `bert_config.json` with its flags (`mult`, `pals`, `houlsby`, `top`,
            `bert_lay_top`, `lhuc`, `hidden_size_aug`, `extra_dim`), and `labels`: each task's
            number of classes, 1 for regression.
        state_dict: the tensors under their original names ("bert.encoder.layer.0...",
            "classifier.0.weight").

    Raises:
        UserError: if the flags describe no method, or tensors do not fit; every problem is listed.
    """
    if missing := {"labels", "hidden_size_aug"} - set(config):
        raise UserError(f"the Bert-n-Pals config lacks {', '.join(sorted(missing))}.")
    model = MultiTaskModel(
        BertConfig.from_mapping(config), tuple(config["labels"]), _method(config)
    )
    slots = bert_n_pals_slots(model)
    return model, tables.read(model, slots, state_dict, source="the Bert-n-Pals checkpoint")


def to_bert_n_pals(model: MultiTaskModel, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors under their original names; also converts gradients, which have the same tree.

    Raises:
        UserError: if the original format cannot hold the method.
    """
    if not _is_theirs(model.method):
        raise UserError(
            "a Bert-n-Pals checkpoint cannot hold"
            f" {', '.join(repr(spec.name) for spec in model.method)} with these options; it holds"
            " shared, pals, low_rank with gelu, lhuc, bert_n_pals_houlsby, houlsby_plus_pals,"
            " top_attention and top_layer with default options except for sizes."
        )
    return tables.write(variables, bert_n_pals_slots(model))


def _is_theirs(method: Method) -> bool:
    """Whether one of their configs describes this method."""
    sizes = [getattr(getattr(spec, "form", None), "size", None) for spec in method]
    first, last = (sizes[0] or 1, sizes[-1] or 1) if sizes else (1, 1)
    flags: list[dict[str, Any]] = [
        {},
        {"mult": True},
        {"mult": True, "pals": True},
        {"houlsby": True},
        {"houlsby": True, "pals": True},
        {"top": True},
        {"top": True, "bert_lay_top": True},
        {"lhuc": True},
    ]
    for config in flags:
        try:
            if _method({**config, "hidden_size_aug": last, "extra_dim": first}) == method:
                return True
        except UserError:  # the size is not divisible by the number of heads of that method
            continue
    return False


def _method(config: Mapping[str, Any]) -> Method:
    flags = {name for name in ("mult", "houlsby", "top", "lhuc") if config.get(name)}
    if len(flags) > 1:
        raise UserError(
            f"a Bert-n-Pals config cannot combine {' and '.join(sorted(flags))}; set one of them."
        )
    size, extra = config["hidden_size_aug"], config.get("extra_dim")
    if "houlsby" in flags:
        if config.get("pals"):
            return methods.houlsby_plus_pals(size, attention_size=extra or size)
        return methods.bert_n_pals_houlsby(size)
    if "top" in flags:
        if config.get("bert_lay_top"):
            return methods.top_layer()
        return methods.top_attention(size)
    if "lhuc" in flags:
        return methods.lhuc()
    if "mult" in flags:
        if config.get("pals"):
            return methods.pals(size)
        return methods.low_rank(extra or size, activation="gelu")
    return methods.shared()


def bert_n_pals_slots(model: MultiTaskModel) -> Iterator[Slot]:
    """The table of names: the encoder under Hugging Face's names, then the tasks' parameters."""
    old_norm = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old_name(name: str) -> str:
        for new, old in old_norm.items():
            name = name.replace(new, old)
        return f"bert.{name}"

    yield from tables.renamed(tables.bert(model.config), old_name)
    for task, outputs in enumerate(model.num_outputs):
        yield from tables.head(f"classifier.{task}", task, outputs)
        for adapter in model.method:
            assert isinstance(adapter, Adapter)  # none of their methods has a TaskCopy
            yield from tables.renamed(_adapter_slots(model, adapter, task), old_name)


def _adapter_slots(model: MultiTaskModel, adapter: Adapter, task: int) -> Iterator[Slot]:
    depth = model.config.num_hidden_layers
    path = ("adapters", adapter.name)
    if adapter == methods.lhuc()[0]:
        for layer in range(depth):
            name = f"encoder.layer.{layer}.multi_lhuc.{task}.lhuc"
            yield Slot(name, (*path, "layers", "weight"), (task, layer))
    elif adapter.site == "top":
        yield from _top_slots(adapter, task)
    else:
        for layer in range(depth):
            name = f"encoder.layer.{layer}.{_PLACES[adapter.site]}.{task}"
            yield from _layer_slots(name, adapter, task, layer)
        if adapter.shared:
            down, up = f"encoder.mult_aug_dense.{task}", f"encoder.mult_aug_dense2.{task}"
            yield from tables.dense(down, (*path, "shared", "down"), (task,))
            yield from tables.dense(up, (*path, "shared", "up"), (task,))


def _layer_slots(name: str, adapter: Adapter, task: int, layer: int) -> Iterator[Slot]:
    """One task's adapter in one layer; the original repeats shared matrices in every layer."""
    for projection in adapter.form.parameters(1, 1, BertConfig()):
        shared = projection in adapter.shared
        path = ("adapters", adapter.name, "shared" if shared else "layers", projection)
        index = (task,) if shared else (task, layer)
        yield from tables.dense(f"{name}.{_PROJECTIONS[projection]}", path, index)


def _top_slots(adapter: Adapter, task: int) -> Iterator[Slot]:
    path, layers = ("adapters", adapter.name, "shared"), f"encoder.multi_layers.{task}"
    if adapter == methods.top_layer()[0]:
        yield from tables.bert_layer(layers, (*path, "blocks"), (task, 0))
        return
    yield from tables.dense(f"encoder.mult_dense.{task}", (*path, "down"), (task,))
    yield from tables.dense(f"encoder.mult_dense2.{task}", (*path, "up"), (task,))
    for block in range(6):
        name, index = f"{layers}.{block}", (task, block)
        attention = (*path, "blocks", "attention")
        for projection in ("query", "key", "value"):
            yield from tables.dense(f"{name}.self.{projection}", (*attention, projection), index)
        yield from tables.dense(f"{name}.output.dense", (*attention, "output"), index)
        yield from tables.norm(f"{name}.output.LayerNorm", (*path, "blocks", "norm"), index)
