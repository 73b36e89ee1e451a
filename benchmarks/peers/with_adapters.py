"""A worker: Houlsby adapters in AdapterHub's library `adapters`."""

from pathlib import Path
from typing import Any

import torch_steps
from adapters import AutoAdapterModel
from adapters.composition import Parallel
from safetensors.torch import load_file


def load(work: Path, given: dict[str, Any]) -> torch_steps.Library:
    """Loads the tasks' adapters from their directories, and heads on the encoder's pooler."""
    model = AutoAdapterModel.from_pretrained(given["encoder"], attn_implementation="sdpa")
    heads = load_file(work / "heads.safetensors")
    for task, outputs in given["tasks"].items():
        model.load_adapter(str(work / task), with_head=False, use_safetensors=True)
        model.add_classification_head(task, num_labels=outputs, layers=1, use_pooler=True)
        weights = {n.removeprefix(f"{task}."): x for n, x in heads.items() if n.startswith(task)}
        model.heads[task][-1].load_state_dict(weights)
    model.train_adapter(Parallel(*given["tasks"]))
    trained = [x for x in model.parameters() if x.requires_grad]
    return torch_steps.Library(model, model.set_active_adapters, trained)


if __name__ == "__main__":
    torch_steps.main(load)
