"""A worker: LoRA in Hugging Face's library `peft`."""

from pathlib import Path
from typing import Any, cast

import torch_steps
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification


def load(work: Path, given: dict[str, Any]) -> torch_steps.Library:
    """Loads the tasks' LoRA and heads from their directories."""
    tasks, config = given["tasks"], LoraConfig(task_type="SEQ_CLS")
    encoder = BertForSequenceClassification.from_pretrained(
        given["encoder"], attn_implementation="sdpa"
    )
    first, *others = tasks
    model = get_peft_model(encoder, config, adapter_name=first)
    for task in others:
        model.add_adapter(task, config)
    heads = cast(nn.ModuleDict, encoder.classifier.modules_to_save)
    for task, outputs in tasks.items():
        heads[task] = nn.Linear(
            encoder.config.hidden_size, outputs
        )  # peft makes all heads the same size
        set_peft_model_state_dict(
            model, load_file(work / task / "adapter_model.safetensors"), adapter_name=task
        )
    names = ("lora_", "modules_to_save")
    trained = [x for name, x in model.named_parameters() if any(part in name for part in names)]
    return torch_steps.Library(model, model.set_adapter, trained)


if __name__ == "__main__":
    torch_steps.main(load)
