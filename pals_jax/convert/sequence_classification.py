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

# The family of its classes, by architecture.
_CLASSES = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}


def from_sequence_classification(
    directory: str | Path,
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """The model (T = 1, no adapters) and variables of a fine-tuned classifier or regressor.

    Args:
        directory: anything that `huggingface.resolve` takes.

    Raises:
        UserError: none there, another kind of model or problem, or tensors that do not fit.
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

    What the task changes of the encoder's weights (LoRA, IA3, its own layer norms, biases, layers
    or pooler) is merged into them. The tokenizer is not written.

    Args:
        model: the model of T tasks.
        variables: its variables.
        task: the index of the task.
        directory: is made if need be.
        labels: the names of its classes, or one name of the number that a regression gives (on
            the scale of the training targets); by default LABEL_0, LABEL_1, ...

    Returns:
        What was written, as a model (T = 1, no adapters) and its variables.

    Raises:
        UserError: no such task, a wrong number of labels, or a method that the architecture of
            transformers has no place for; nothing is written then.
    """
    model, variables = merged(model, variables, task)
    name, (num_outputs,) = _CLASSES[model.config.model_type], model.num_outputs
    if model.method:
        left = ", ".join(spec.name for spec in model.method)
        raise UserError(
            f"{left} of the task cannot be expressed in {name}, which has no place for adapters;"
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
    """The table of names, without the prefix "bert." or "roberta." of the encoder's.

    RoBERTa has no pooler, but a classifier of two layers, the first of which is one.
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
            f"{path} has the problem {problem} with {count} outputs; only one class of several"
            " (single_label_classification) or the regression of one number is held here."
        )
    return count
