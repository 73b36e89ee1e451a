"""The GLUE mix: the data that the benchmarks share.

Tasks are drawn by annealed sampling with the official sizes of the eight training sets. The steps
are spread evenly over the whole run of configs/pals_glue.py, to include early and late ones.
Where a local training set is a sample of the official one, its examples are repeated.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from pals_jax.convert import huggingface
from pals_jax.data.batch import Batch
from pals_jax.data.batches import TrainBatches
from pals_jax.data.packing import Padded
from pals_jax.data.sampler import Draw, Sampler
from pals_jax.data.tokenize import load_tokenizer
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.experiment import Experiment
from pals_jax.runtime.shards import Shards

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pals_glue.py"
SIZES = {  # the official sizes of the training sets
    "cola": 8551, "mrpc": 3668, "mnli": 392702, "rte": 2490,
    "stsb": 5749, "sst2": 67349, "qqp": 363846, "qnli": 104743,
}  # fmt: skip
GOLDEN = (5**0.5 - 1) / 2  # any number of its multiples, modulo 1, are spread evenly


class Mix:
    """The steps of the mix: training, and inference for the same tasks.

    Attributes:
        experiment: configs/pals_glue.py in float32, with another encoder, method or batch size.
        splits: the training splits of its tasks.
        draws: the draws of 256 steps; the first n of them are spread over the run for any n.
        steps: the number of steps of the whole run.
    """

    def __init__(self, glue: str, encoder: str, **changes: Any) -> None:
        """Reads and tokenises the official files in the directory `glue`."""
        config = config_lib.load([f"--config={CONFIG}"])
        config.update({"encoder": encoder, "dtype": "float32", **changes})
        config.data.update({"source": "glue_dir", "dir": glue})
        self.experiment = Experiment.from_config(config)
        self._tokenizer = load_tokenizer(huggingface.resolve(config.encoder))
        tasks = self.experiment.tasks
        self.splits = [self.experiment.read(task, "train", self._tokenizer) for task in tasks]
        plan = self.experiment.sampler([SIZES[task.name] for task in tasks])
        have = np.array([len(split) for split in self.splits])
        self.steps, spread = plan.steps, plan.spread()
        assert len(spread) == 256
        drawn = (plan.draw(spread[37 * i % 256]) for i in range(256))
        self.draws = [Draw(d.trained_ids, d.examples % have[d.trained_ids][:, None]) for d in drawn]

    def spread(self) -> range:
        """As `Sampler.spread`."""
        return range(len(self.draws))

    def draw(self, step: int) -> Draw:
        """As `Sampler.draw`."""
        return self.draws[step]

    @functools.cached_property
    def dev(self) -> list[TokenizedSplit]:
        """The first dev set of each task."""
        tasks = self.experiment.tasks
        return [next(iter(self.experiment.read_eval(t, self._tokenizer).values())) for t in tasks]

    def length_grouped(self) -> list[Draw]:
        """For each draw, a batch of its task from transformers' `LengthGroupedSampler`.

        It takes 50 batches of examples at random, or a quarter of all if that is less, and sorts
        these by length. A run sees all the batches; here each step takes another one.
        """
        size, rng = self.experiment.config.batch_size, np.random.default_rng(0)
        draws = []
        for step, draw in enumerate(self.draws):
            lengths = self.splits[draw.trained_ids[0]].lengths
            batches = max(1, min(len(lengths) // (4 * size), 50))
            some = rng.choice(len(lengths), batches * size, replace=False)
            order = some[np.argsort(-lengths[some], kind="stable")]
            draws.append(Draw(draw.trained_ids, _batch(order, size, step)[None]))
        return draws

    def inference(self, each: int, *, by_length: bool) -> list[Draw]:
        """For each draw a batch of a dev set, in the order of length or of the file.

        Every `each` consecutive steps have one task, that of the first of these draws.
        """
        size, draws = self.experiment.config.batch_size, []
        for step in range(len(self.draws)):
            task_ids = self.draws[step - step % each].trained_ids
            lengths = self.dev[task_ids[0]].lengths
            order = np.argsort(lengths, kind="stable") if by_length else np.arange(len(lengths))
            draws.append(Draw(task_ids, _batch(order, size, step)[None]))
        return draws

    def variables(self) -> Any:
        """The encoder's weights, and adapters with noise, because some start as the identity."""
        model, seed = self.experiment.model(), self.experiment.config.seed
        path = huggingface.resolve(self.experiment.config.encoder)
        variables = huggingface.load_variables(model, path, seed)
        rng = np.random.default_rng(seed)

        def moved(x: Any) -> Any:
            return x + 0.02 * rng.standard_normal(x.shape, np.float32)

        return variables | {"adapters": jax.tree.map(moved, variables["adapters"])}

    def packed(self) -> TrainBatches:
        """Packed batches, as in training."""
        return self.experiment.train_batches(self.splits, cast(Sampler, self), Shards())

    def save_padded(
        self, path: Path, draws: Sequence[Draw], splits: Sequence[TokenizedSplit]
    ) -> None:
        """Writes draws of `splits` for the peers, one example per row.

        The file holds int32 input_ids, token_type_ids, attention_mask [steps, B, max_length],
        task_ids [steps], and float32 targets [steps, B].
        """
        batches = [self._padded(draw, splits) for draw in draws]
        steps: dict[str, Any] = {
            name: np.stack([getattr(batch, name) for batch in batches])
            for name in ("input_ids", "token_type_ids", "attention_mask")
        }
        steps["task_ids"] = np.array([batch.task_ids[0] for batch in batches])
        steps["targets"] = np.stack([np.asarray(batch.targets)[:, 0] for batch in batches])
        np.savez(path, **steps)

    def _padded(self, draw: Draw, splits: Sequence[TokenizedSplit]) -> Batch:
        length = self.experiment.config.data.max_length
        placing = Padded(draw.examples.size, length)
        make = TrainBatches(splits, self.experiment.layout, placing, Shards(), 0, len(splits))
        batch = jax.tree.map(lambda x: x[0], make(draw))
        room = length - batch.input_ids.shape[1]
        ids, types, mask = (np.pad(x, [(0, 0), (0, room)]) for x in batch.tokens)
        return batch.replace(input_ids=ids, token_type_ids=types, attention_mask=mask)


def _batch(order: np.ndarray, size: int, step: int) -> np.ndarray:
    """The batch of a step; each step takes it from another place in `order`."""
    place = int((step * GOLDEN) % 1 * (len(order) // size))
    return order[place * size : (place + 1) * size]


def taken(split: TokenizedSplit, examples: np.ndarray) -> TokenizedSplit:
    """Some examples of a split, as a split."""
    spans = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for i in examples]
    offsets = np.cumsum([0, *map(len, spans)])
    return TokenizedSplit(
        np.concatenate(spans), offsets, split.first[examples], split.targets[examples]
    )
