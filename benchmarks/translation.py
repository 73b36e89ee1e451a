"""Tokens per second of a training step on a frozen Marian, ours and transformers', side by side.

    python benchmarks/translation.py --model=opus-mt-en-fr --pairs=EN_RO

The mix-and-match adapter of configs/marian_enro.py and its batches of 32 pairs, in float32, with
dropout, label smoothing and AdamW. The library `adapters` has no Marian, so the other side is
transformers' model with the same adapter in PyTorch; it pads to the longest source and target of a
batch. Both have the same weights, and must compute the same losses before they take turns. Prints
one JSON line: the seconds of all rounds, and the median ratio within the rounds with its range.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pals_jax.convert import huggingface
from pals_jax.data.batch import Batch
from pals_jax.data.batches import TrainBatches
from pals_jax.data.packing import Padded
from pals_jax.data.sampler import Sampler
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.optim import make_optimizer
from pals_jax.runtime.shards import Shards
from pals_jax.training.losses import loss_weights, summed_loss
from pals_jax.training.step import create_state, train_step_of

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "marian_enro.py"
SCALE = 4.0  # of the parallel adapter, in the configuration
MAM = "mam"  # the name of the attention with a prefix


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="a directory of Hugging Face")
    parser.add_argument("--pairs", required=True, type=Path, help="as in configs/marian_enro.py")
    parser.add_argument("--steps", default=4, type=int, help="in a round")
    parser.add_argument("--rounds", default=5, type=int, help="how often each is timed")
    args = parser.parse_args()
    config = config_lib.load([f"--config={CONFIG}:@{args.pairs}", f"--config.encoder={args.model}"])
    ours = Ours(Experiment.from_config(config))
    theirs = Theirs(args.model, ours.variables["adapters"], config.label_smoothing)
    steps = range(args.rounds * args.steps)
    padded = [ours.padded(step) for step in steps]
    np.testing.assert_allclose(ours.loss(0), theirs.loss(padded[0]), rtol=1e-5)
    ours.compile(steps)
    theirs.train(padded[:1])
    seconds: list[tuple[float, float]] = []
    for first in steps[:: args.steps]:
        here = range(first, first + args.steps)
        own = _timed(partial(ours.train, here))
        other = _timed(partial(theirs.train, padded[here.start : here.stop]))
        seconds.append((own, other))
    ratios = [other / own for own, other in seconds]
    tokens = sum(_tokens(batch) for batch in padded)
    result = {
        "times_as_fast": {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        },
        "tokens_per_second": tokens / sum(own for own, _ in seconds),
        "tokens_per_second_of_transformers": tokens / sum(other for _, other in seconds),
        "seconds": [own for own, _ in seconds],
        "seconds_of_transformers": [other for _, other in seconds],
        "padded_positions_of_transformers": sum(map(_positions, padded)) / tokens,
        "shapes": sorted({ours.batches.place(ours.sampler.draw(step))[0].shape for step in steps}),
    }
    print(json.dumps(result), flush=True)


class Ours:
    """The training step as `pals-jax train` takes it."""

    def __init__(self, experiment: Experiment) -> None:
        """Reads the pairs and the weights; the adapters get noise, since some begin at zero."""
        config, self._experiment = experiment.config, experiment
        (task,) = experiment.tasks
        self._split = experiment.read(task, "train", experiment.load_tokenizer())
        self.sampler: Sampler = experiment.sampler([len(self._split)])
        self.batches = experiment.train_batches([self._split], self.sampler, Shards())
        self._model, rng = experiment.model(), np.random.default_rng(0)
        variables = huggingface.load_variables(self._model, Path(config.encoder), config.seed)
        moved = jax.tree.map(
            lambda x: np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32),
            variables["adapters"],
        )
        self.variables = variables | {"adapters": moved}
        optimizer, _ = make_optimizer(config.optimizer, 1, self.sampler.steps)
        self._step = jax.jit(train_step_of(experiment, optimizer), donate_argnums=0)
        self._state = create_state(self.variables, config.trainable, optimizer)

    def compile(self, steps: range) -> None:
        """Takes one step of each shape."""
        shapes = {self.batches.place(self.sampler.draw(i))[0].shape: i for i in steps}
        for i in shapes.values():
            self.train(range(i, i + 1))

    def train(self, steps: range) -> None:
        """Takes training steps."""
        for i in steps:
            self._state, _ = self._step(self._state, self._batch(self.batches, i))
        jax.block_until_ready(self._state)

    def loss(self, i: int) -> float:
        """The mean loss of a batch's tokens, without dropout and smoothing."""
        batch = self._batch(self.batches, i)
        summed = jax.jit(lambda v, b: summed_loss(self._model, v, b, b.task_ids))
        return float(summed(self.variables, batch) / loss_weights(batch).sum())

    def padded(self, i: int) -> Batch:
        """The batch of a step padded to its longest source and its longest target."""
        config = self._experiment.config
        placing = Padded(config.batch_size, self._experiment.room)
        make = TrainBatches([self._split], self._experiment.layout, placing, Shards(), 0, 1)
        batch = self._batch(make, i)
        assert batch.target_texts is not None
        source = int(batch.attention_mask.sum(1).max())
        target = int(batch.target_texts.attention_mask.sum(1).max())
        return batch.replace(
            input_ids=batch.input_ids[:, :source],
            attention_mask=batch.attention_mask[:, :source],
            target_texts=jax.tree.map(lambda x: x[:, :target], batch.target_texts),
        )

    def _batch(self, make: TrainBatches, i: int) -> Batch:
        batch: Batch = jax.tree.map(lambda x: x[0], make(self.sampler.draw(i)))
        return batch


class Theirs:
    """transformers' Marian with the mix-and-match adapter, and PyTorch's AdamW."""

    def __init__(self, model: Path, adapters: Any, smoothing: float) -> None:
        """Reads the weights; `adapters` are ours, of one task."""
        transformers.AttentionInterface.register(MAM, attention_with_prefix)
        AttentionMaskInterface.register(MAM, sdpa_mask)
        self._model = transformers.MarianMTModel.from_pretrained(
            model, dtype=torch.float32, attn_implementation=MAM
        )
        self._model.requires_grad_(False)
        trained: list[nn.Parameter] = []
        for name, stack in (
            ("", self._model.model.encoder),
            ("decoder.", self._model.model.decoder),
        ):
            for index, layer in enumerate(stack.layers):

                def own(part: str, *leaves: str, i: int = index, at: str = name) -> nn.Parameter:
                    x = adapters[f"{at}{part}"]["layers"]
                    for leaf in leaves:
                        x = x[leaf]
                    parameter = nn.Parameter(torch.tensor(x[0, i]))
                    trained.append(parameter)
                    return parameter

                layer.self_attn.prefix = [own("prefix", x) for x in ("key", "value")]
                if name:
                    layer.encoder_attn.prefix = [own("cross.prefix", x) for x in ("key", "value")]
                halves = ("down", "up")
                weights = [own("ffn_adapter", x, y) for x in halves for y in ("kernel", "bias")]
                add_parallel(layer, *weights)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self._smoothing = smoothing

    def loss(self, batch: Batch) -> float:
        """The mean loss of a batch's tokens, without dropout and smoothing."""
        self._model.eval()
        with torch.inference_mode():
            return float(self._loss(batch, 0.0))

    def train(self, batches: Sequence[Batch]) -> None:
        """Takes training steps."""
        self._model.train()
        for batch in batches:
            self._optimizer.zero_grad()
            self._loss(batch, self._smoothing).backward()
            self._optimizer.step()

    def _loss(self, batch: Batch, smoothing: float) -> torch.Tensor:
        texts = batch.target_texts
        assert texts is not None
        arrays = batch.input_ids, batch.attention_mask, texts.input_ids, texts.attention_mask
        ids, mask, target_ids, target_mask = (torch.tensor(x).long() for x in arrays)
        logits = self._model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=target_ids,
            decoder_attention_mask=target_mask,
            use_cache=False,
        ).logits
        labels = torch.tensor(texts.labels).long().masked_fill(target_mask == 0, -100)
        return functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing
        )


def attention_with_prefix(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """Attention whose keys and values begin with those of the module's prefix, [P, D] both."""
    rows, heads, length, size = query.shape
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, length, key.shape[2], dtype=torch.bool)
        if module.is_causal:
            attention_mask = attention_mask.tril()

    def behind(prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        split = prefix.view(1, -1, heads, size).transpose(1, 2)
        return torch.cat([split.expand(rows, -1, -1, -1), x], dim=2)

    own_keys, own_values = module.prefix
    mask = functional.pad(
        attention_mask, (len(own_keys), 0), value=attention_mask.dtype == torch.bool
    )
    key, value = behind(own_keys, key), behind(own_values, value)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def add_parallel(
    layer: Any, down: nn.Parameter, b: nn.Parameter, up: nn.Parameter, c: nn.Parameter
) -> None:
    """Adds s (ReLU(x W_down + b) W_up + c) of the feed-forward block's input x to its output."""
    inputs: list[torch.Tensor] = []
    layer.fc1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    layer.fc2.register_forward_hook(
        lambda _, args, y: y + SCALE * (functional.relu(inputs.pop() @ down + b) @ up + c)
    )


def _timed(run: Callable[[], object]) -> float:
    """The seconds that it takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _tokens(batch: Batch) -> int:
    """The tokens of sources and targets."""
    assert batch.target_texts is not None
    return int(batch.attention_mask.sum() + batch.target_texts.attention_mask.sum())


def _positions(batch: Batch) -> int:
    """Those and the padding."""
    assert batch.target_texts is not None
    return int(batch.attention_mask.size + batch.target_texts.attention_mask.size)


if __name__ == "__main__":
    main()
