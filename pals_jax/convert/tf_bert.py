"""Google's TensorFlow BERT, with and without the adapters of Houlsby et al. (adapter-bert).

That code uses the tanh approximation of GELU in the encoder and the adapters, while transformers
uses the exact GELU: "gelu" in its `bert_config.json` is "gelu_new" here.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pals_jax.convert import tables
from pals_jax.convert.tables import Slot
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck
from pals_jax.models.adapters.methods import Method
from pals_jax.models.adapters.spec import Adapter
from pals_jax.models.bert import BertConfig
from pals_jax.models.merge import merged
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "tanh": "tanh"}
_EPSILON = 1e-12  # layer norm epsilon, hard-coded there

# Pre-training heads and optimiser state.
_MAY_IGNORE = r"cls/|global_step$|.*/adam_[mv]$"
_HEAD = {"output_weights", "output_bias"}
_ADAPTERS = {"attention_adapter": "attention/output/adapters", "ffn_adapter": "output/adapters"}
_RENAMED = {
    r"layer\.(\d+)": r"layer_\1",
    r"LayerNorm\.weight": "LayerNorm.gamma",
    r"LayerNorm\.bias": "LayerNorm.beta",
    r"embeddings\.weight": "embeddings",
    r"weight": "kernel",
    r"\.": "/",
}


def from_tf_bert(
    config: Mapping[str, Any],
    variables: Mapping[str, np.ndarray],
    adapters: Method = (),
    tasks: Sequence[int] = (),
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """The model and variables of an original checkpoint, with its own task or with new tasks.

    By default the model has the checkpoint's own task (T = 1): if the checkpoint has adapters, the
    method is `houlsby` with task-specific layer norms; if it has no head, as after pre-training,
    the head is new and has two classes. With `adapters` or `tasks`, all adapters and heads are new,
    as in `from_huggingface`; the checkpoint must then have none.

    Args:
        config: the original `bert_config.json`.
        variables: the variables under their original names ("bert/encoder/layer_0/..."), as
            `tf_checkpoint.read_tf_checkpoint` returns them. Optimiser state, step and pre-training
            heads are ignored.
        adapters: the method of new tasks.
        tasks: each new task's number of classes, 1 for regression; by default one task with two.

    Raises:
        UserError: if the activation is unknown, or tensors do not fit; every problem is listed.
    """
    activation = config.get("hidden_act", "gelu")
    architecture = BertConfig.from_mapping(
        {**config, "hidden_act": _ACTIVATIONS.get(activation, activation)}
    )
    if adapters or tasks:
        model = MultiTaskModel(architecture, tuple(tasks) or (2,), adapters)
        slots, may_lack = _encoder_slots(architecture), "$^"
    else:
        has_head = bool(_HEAD & variables.keys())
        outputs = np.size(variables["output_bias"]) if "output_bias" in variables else 2
        model = MultiTaskModel(architecture, (outputs,), _method(variables))
        slots, may_lack = tf_bert_slots(model), "$^" if has_head else "|".join(_HEAD)
    return model, tables.read(
        model,
        slots,
        variables,
        source="the TensorFlow checkpoint",
        may_lack=may_lack,
        may_ignore=_MAY_IGNORE,
    )


def to_tf_bert(
    model: MultiTaskModel, variables: Mapping[str, Any], task: int
) -> dict[str, np.ndarray]:
    """One task's variables under the original names, float32.

    The task's changes to encoder weights (LoRA, IA3, its own layer norms, biases, layers or pooler)
    are merged into them.

    Raises:
        UserError: if there is no such task, or the original code cannot express its method or
            encoder.
    """
    model, variables = merged(model, variables, task)
    config = model.config
    if config.model_type != "bert" or config.layer_norm_eps != _EPSILON:
        raise UserError(
            f"the encoder is a {config.model_type} with layer_norm_eps {config.layer_norm_eps};"
            f" the TensorFlow code supports only bert with {_EPSILON}."
        )
    if config.hidden_act not in _ACTIVATIONS.values():
        raise UserError(
            f"the encoder's hidden_act is {config.hidden_act!r}; the TensorFlow code supports only"
            f" {', '.join(_ACTIVATIONS.values())}."
        )
    if not _is_houlsby(model.method):
        left = ", ".join(spec.name for spec in model.method)
        raise UserError(
            f"the task's {left} cannot be expressed in the TensorFlow code, which supports only"
            ' houlsby(activation="gelu_new").'
        )
    return tables.write(variables, tf_bert_slots(model))


def tf_bert_slots(model: MultiTaskModel) -> Iterator[Slot]:
    """The table of names of a model with T = 1."""
    yield from _encoder_slots(model.config)
    for adapter, place in _ADAPTERS.items() if model.method else ():
        for layer in range(model.config.num_hidden_layers):
            name, path = f"bert/encoder/layer_{layer}/{place}", ("adapters", adapter, "layers")
            for number, projection in enumerate(("down", "up"), 1):
                yield Slot(f"{name}/weights{number}", (*path, projection, "kernel"), (0, layer))
                # Their biases are [1, S]: slicing the task axis provides the leading 1.
                bias = (*path, projection, "bias")
                yield Slot(f"{name}/biases{number}", bias, (slice(1), layer))
    yield Slot("output_weights", ("adapters", "head", "kernel"), (0,), transpose=True)
    yield Slot("output_bias", ("adapters", "head", "bias"), (0,))


def _encoder_slots(config: BertConfig) -> Iterator[Slot]:
    for slot in tables.bert(config):
        name = slot.name
        for pattern, replacement in _RENAMED.items():
            name = re.sub(pattern, replacement, name)
        yield dataclasses.replace(slot, name=f"bert/{name}", transpose=False)


def _method(variables: Mapping[str, np.ndarray]) -> Method:
    sizes = [x.shape[-1] for name, x in variables.items() if name.endswith("/adapters/weights1")]
    return methods.houlsby(size=sizes[0], activation="gelu_new") if sizes else ()


def _is_houlsby(method: Method) -> bool:
    """Whether a merged method is the original code's, or empty."""
    forms = (spec.form for spec in method if isinstance(spec, Adapter))
    sizes = {form.size for form in forms if isinstance(form, Bottleneck)}
    return method == () or any(
        method == methods.houlsby(size, activation="gelu_new", norms=False) for size in sizes
    )
