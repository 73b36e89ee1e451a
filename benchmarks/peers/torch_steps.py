"""A worker: training and inference with a PyTorch library, at its best settings.

A batch is as long as its longest text. Attention is fused. On a GPU the model is compiled. bfloat16
means PyTorch's mixed precision (autocast): trained parameters stay float32, as in ours.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from worker import Peak, serve

Batch = dict[str, Tensor]
TOKENS = ("input_ids", "token_type_ids", "attention_mask")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Library(NamedTuple):
    """The library's model, with an adapter and a head for each task.

    Attributes:
        model: takes `TOKENS` and returns an object with `logits`.
        activate: activates the adapter and the head of a task, given its name.
        trained: the parameters of all adapters and heads.
    """

    model: nn.Module
    activate: Callable[[str], Any]
    trained: list[nn.Parameter]


def main(load: Callable[..., Library]) -> None:
    """Loads, reports the losses of the first steps without dropout, then serves requests.

    Args:
        load: makes the library's model from the work folder and its description.
    """
    work = Path(sys.argv[1])
    given = json.loads((work / "theirs.json").read_text())
    torch.set_num_threads(os.cpu_count() or 1)
    steps, kind = Steps(load(work, given), given), given["kind"]
    check = _read(work / "training, longest.npz")[: given["check"]]
    losses = [steps.loss(batch) for batch in check]
    padded = {path.stem: _read(path) for path in work.glob(f"{kind}, *.npz")}
    steps.warm_up(kind, [batch for batches in padded.values() for batch in batches])

    def do(padding: str, begin: int, end: int) -> None:
        take = getattr(steps, kind)
        if padding == "products alone":
            take, padding = partial(steps.products, kind), "longest"
        for batch in padded[f"{kind}, {padding}"][begin:end]:
            take(batch)
        if ON_GPU:
            torch.cuda.synchronize()

    cuda = torch.cuda
    peak = Peak(cuda.reset_peak_memory_stats, cuda.max_memory_allocated) if ON_GPU else None
    name = cuda.get_device_name() if ON_GPU else "cpu"
    serve({"losses": losses, "device": name, "compiled": steps.is_compiled}, do, peak)


def _read(path: Path) -> list[Batch]:
    """The batches of a file, each cut to its longest text."""
    arrays = {name: torch.tensor(x) for name, x in np.load(path).items()}
    batches = [{name: x[i] for name, x in arrays.items()} for i in range(len(arrays["task_ids"]))]
    for batch in batches:
        longest = int(batch["attention_mask"].sum(1).max())
        batch |= {name: batch[name][:, :longest].long().contiguous() for name in TOKENS}
    return batches


class Steps:
    """The steps of a training loop and of an evaluation loop."""

    def __init__(self, library: Library, given: dict[str, Any]) -> None:
        """`given` holds the dtype, and each task's name and number of outputs."""
        self._library, self._tasks = library, list(given["tasks"].items())
        self._autocast = torch.autocast(
            DEVICE.type, torch.bfloat16, enabled=given["dtype"] == "bfloat16"
        )
        self._model = library.model.to(DEVICE)
        self.is_compiled = False
        self._kernels = [  # [out, in], in the order of use
            x.detach()
            for name, x in self._model.named_parameters()
            if ".encoder.layer." in name and x.ndim == 2 and not x.requires_grad
        ]
        self._optimizer = torch.optim.AdamW(library.trained, 2e-5, weight_decay=0.01, fused=True)

    def training(self, batch: Batch) -> None:
        """One step."""
        self._model.train()
        logits, targets = self._logits(batch), batch["targets"].to(DEVICE)
        _mean_loss(logits, targets).backward()
        nn.utils.clip_grad_norm_(self._library.trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def inference(self, batch: Batch) -> np.ndarray:
        """The logits."""
        self._model.eval()
        with torch.inference_mode():
            return self._logits(batch).float().cpu().numpy()

    @torch.no_grad()
    def products(self, kind: str, batch: Batch) -> None:
        """Only the matrix products of the encoder's kernels with the texts, without padding.

        Training adds the products for the gradients, down to but not including the first layer's
        queries, keys and values, because nothing below them is trained.
        """
        tokens = int(batch["attention_mask"].sum())
        sizes = {size for kernel in self._kernels for size in kernel.shape}
        ones = {size: torch.ones(tokens, size, device=DEVICE) for size in sizes}
        with self._autocast:
            for i, kernel in enumerate(self._kernels):
                outputs, inputs = kernel.shape
                nn.functional.linear(ones[inputs], kernel)
                if kind == "training" and i >= 3:
                    torch.mm(ones[outputs], kernel)

    def loss(self, batch: Batch) -> float:
        """The loss without dropout."""
        return float(_mean_loss(torch.tensor(self.inference(batch)), batch["targets"]))

    def warm_up(self, kind: str, batches: list[Batch]) -> None:
        """Takes a step; on a GPU, first compiles the model if that works."""
        if ON_GPU:
            self._compile(kind, batches)
        getattr(self, kind)(batches[0])

    def _compile(self, kind: str, batches: list[Batch]) -> None:
        plain = self._model
        torch._dynamo.config.recompile_limit = 100  # it compiles for each task and mode
        self._model = cast(nn.Module, torch.compile(plain, dynamic=True))
        try:
            for batch in batches:
                getattr(self, kind)(batch)
            self.is_compiled = True
        except Exception as error:  # of many types; a model that cannot be compiled runs uncompiled
            print(f"not compiled: {error}", file=sys.stderr)
            self._model = plain

    def _logits(self, batch: Batch) -> Tensor:
        name, outputs = self._tasks[int(batch["task_ids"])]
        self._library.activate(name)
        with self._autocast:
            logits = self._model(**{name: batch[name].to(DEVICE) for name in TOKENS}).logits
        assert logits.shape[-1] == outputs
        return logits


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[-1] == 1:
        return nn.functional.mse_loss(logits[:, 0].float(), targets)
    return nn.functional.cross_entropy(logits.float(), targets.long())
