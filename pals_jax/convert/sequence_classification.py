"""Hugging Face's `BertForSequenceClassification` and `RobertaForSequenceClassification`."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pals_jax.convert import huggingface, tables, tensor_files
from pals_jax.convert.tables import Slot
from pals_jax.models.bert import BertConfig
from pals_jax.models.merge import merged
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

# The transformers class of each architecture.
_CLASSES = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}


def from_sequence_classification(
    directory: str | Path,
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """The model (T = 1, no adapters) and variables of a fine-tuned classifier or regressor.

    Args:
        directory: anything that `huggingface.resolve` accepts.

    Raises:
        UserError: if there is no model, the kind of model or problem is not supported, or tensors
            do not fit.
    """
    path = huggingface.resolve(directory)
    config = huggingface.read_config(path)
    num_outputs = _num_outputs(path / "config.json")
    model = MultiTaskModel(config, (num_outputs,))
    variables = tables.read(
        model,
        sequence_classification_slots(config, num_outputs),
        huggingface.read_tensors(path),
        source=str(path / "model.safetensors"),
        may_ignore=huggingface.MAY_IGNORE,
    )
    return model, variables


def to_sequence_classification(
    model: MultiTaskModel,
    variables: Mapping[str, Any],
    task: int,
    directory: Path,
    labels: Sequence[str] | None = None,
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """Writes one task as `config.json` and `model.safetensors` for transformers.

    The task's changes to encoder weights (LoRA, IA3, its own layer norms, biases, layers or pooler)
    are merged into them. The tokenizer is not written.

    Args:
        model: the model of T tasks.
        variables: the model's variables.
        task: the index of the task.
        directory: the output directory, created if missing.
        labels: the names of the classes, or one name for the output of a regression (on the scale
            of the training targets); by default LABEL_0, LABEL_1, ...

    Returns:
        The written model (T = 1, no adapters) and its variables.

    Raises:
        UserError: if there is no such task, the number of labels is wrong, or the transformers
            architecture cannot express the method; nothing is written then.
    """
    model, variables = merged(model, variables, task)
    name, (num_outputs,) = _CLASSES[model.config.model_type], model.num_outputs
    if model.method:
        left = ", ".join(spec.name for spec in model.method)
        raise UserError(
            f"the task's {left} cannot be expressed in {name}, which has no place for adapters;"
            " export a task trained with shared, lora, ia3 or copies of the encoder's parameters."
        )
    labels = [f"LABEL_{i}" for i in range(num_outputs)] if labels is None else list(labels)
    if not len(labels) == len(set(labels)) == num_outputs:
        raise UserError(f"task {task} needs {num_outputs} different labels, not {labels}.")
    problem = "regression" if num_outputs == 1 else "single_label_classification"
    config = dataclasses.asdict(model.config) | {
        "architectures": [name],
        "problem_type": problem,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    nested = tables.renamed(
        sequence_classification_slots(model.config, num_outputs),
        lambda name: name if name.startswith("classifier.") else f"{config['model_type']}.{name}",
    )
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tables.write(variables, nested)
    tensor_files.write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return model, variables


def sequence_classification_slots(config: BertConfig, num_outputs: int) -> Iterator[Slot]:
    """The table of names, without the encoder's prefix "bert." or "roberta.".

    RoBERTa's classifier has two layers, of which the first corresponds to our pooler.
    """
    roberta = config.model_type == "roberta"
    pooler = "classifier.dense." if roberta else "pooler.dense."
    yield from tables.renamed(
        tables.bert(config), lambda name: name.replace("pooler.dense.", pooler)
    )
    head = "classifier.out_proj" if roberta else "classifier"
    yield from tables.head(head, 0, num_outputs)


def _num_outputs(path: Path) -> int:
    """The number of classes, or 1 for regression, that a `config.json` declares."""
    config = tensor_files.read_json(path)
    count = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    problem = config.get("problem_type")
    if problem == "multi_label_classification" or (problem == "regression" and count != 1):
        raise UserError(
            f"{path} has the problem {problem} with {count} outputs; only"
            " single_label_classification, or regression with one output, is supported."
        )
    return count
