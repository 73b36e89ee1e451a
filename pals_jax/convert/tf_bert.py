"""Google's TensorFlow BERT, with and without the adapters of Houlsby et al. (adapter-bert).

That code computes GELU by its tanh approximation, in the encoder and in the adapters, where
transformers has the exact one: "gelu" of its `bert_config.json` is "gelu_new" here.
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
_EPSILON = 1e-12  # of its layer norms; no setting

# Pre-training heads and what optimisers keep.
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
    """The model and variables of an original checkpoint: its own task, or new ones.

    Its own task (T = 1), by default: where the checkpoint has adapters the method is `houlsby` with
    the task's own layer norms; a head that it lacks, as pre-trained ones do, is a new one of two
    classes. With `adapters` or `tasks`, all adapters and heads are new, as `from_huggingface` makes
    them; the checkpoint must then be a pre-trained one, without any.

    Args:
        config: the original `bert_config.json`.
        variables: the original names ("bert/encoder/layer_0/..."), as
            `tf_checkpoint.read_tf_checkpoint` gives them. Optimiser states, the step and
            pre-training heads are ignored.
        adapters: the method of new tasks.
        tasks: each new task's number of classes, 1 for regression; one of two if left out.

    Raises:
        UserError: an activation that is not known, or tensors that do not fit; all are listed.
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
    """One task under the original names, float32.

    What the task changes of the encoder's weights (LoRA, IA3, its own layer norms, biases, layers
    or pooler) is merged into them.

    Raises:
        UserError: no such task, or the original code has no place for its method or encoder.
    """
    model, variables = merged(model, variables, task)
    config = model.config
    if config.model_type != "bert" or config.layer_norm_eps != _EPSILON:
        raise UserError(
            f"the encoder is a {config.model_type} with layer_norm_eps {config.layer_norm_eps};"
            f" TensorFlow's code has only bert with {_EPSILON}."
        )
    if config.hidden_act not in _ACTIVATIONS.values():
        raise UserError(
            f"the encoder's hidden_act is {config.hidden_act!r}; TensorFlow's code has only"
            f" {', '.join(_ACTIVATIONS.values())}."
        )
    if not _is_houlsby(model.method):
        left = ", ".join(spec.name for spec in model.method)
        raise UserError(
            f"{left} of the task cannot be expressed in TensorFlow's code; its adapters are those"
            ' of houlsby(activation="gelu_new").'
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
                # Biases are [1, S] there: the task axis stands in for the first.
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
    """Whether a merged method is that of the original code, or nothing."""
    forms = (spec.form for spec in method if isinstance(spec, Adapter))
    sizes = {form.size for form in forms if isinstance(form, Bottleneck)}
    return method == () or any(
        method == methods.houlsby(size, activation="gelu_new", norms=False) for size in sizes
    )
