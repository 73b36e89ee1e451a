"""A model that stays in memory, with room for more tasks, compiled for a few shapes of batch."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from pals_jax.convert import task_file
from pals_jax.convert.task_file import Base
from pals_jax.data.batch import Batch
from pals_jax.data.batches import mixed_batch
from pals_jax.data.examples import Examples
from pals_jax.data.packing import Placement, Shape
from pals_jax.data.queue_packing import QueuePacking
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import TextEncoder, TokenizedSplit
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.lower_layers import LowerLayers
from pals_jax.inference.run import Run
from pals_jax.inference.server.batcher import Item
from pals_jax.inference.steps import make_eval_step
from pals_jax.models import task_axis
from pals_jax.models.adapters.parse import parse_method
from pals_jax.models.merge import flat_prefixes
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel

_OUTPUTS = 64  # the heads have at least this width, as a later task may have more labels
_METADATA = 2**20  # bytes of a task file besides its tensors, at most
_TIMED = 2  # runs of each shape, of which the faster counts


@dataclasses.dataclass
class Text:
    """One text or pair.

    Attributes:
        split: its tokens; once computed, also its hidden states below the first adapter.
    """

    split: TokenizedSplit

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.split.tokens)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The next batch.

    Attributes:
        chosen: the indices of its items among those that wait.
        items: these items.
        placement: their places.
    """

    chosen: list[int]
    items: list[Item]
    placement: Placement


@dataclasses.dataclass(frozen=True)
class NewTask:
    """A task that fits the model, and its rows of the `adapters` collection, leaves [1, ...]."""

    task: Task
    adapters: Any


@dataclasses.dataclass
class ResidentModel:
    """The model of a run, with as many rows on its task axis as there may be tasks.

    One thread computes, writes and warms up; others may `encode`, `read` and `choose` meanwhile.

    Attributes:
        experiment: what the run is about; its tasks may be others by now.
        base: the encoder.
        text_encoder: makes tokens of texts.
        parallel: the devices, over which every batch is divided.
        model: the model.
        variables: its variables; the rows of no task are zero.
        queue: chooses batches; it knows the seconds of each shape once `warm_up` has measured them.
        lower: the layers below the first adapter; None if there are none.
    """

    experiment: Experiment
    base: Base
    text_encoder: TextEncoder
    parallel: DataParallel
    model: MultiTaskModel
    variables: Any
    queue: QueuePacking
    lower: LowerLayers | None

    @classmethod
    def of(cls, run: Run, max_tasks: int) -> Self:
        """The model of a run.

        Args:
            run: the run, whose tasks take the first rows of the task axis.
            max_tasks: the length of that axis.

        Raises:
            UserError: if the run has more tasks than that.
        """
        tasks, parallel = run.experiment.tasks, run.evaluator.parallel
        if max_tasks < len(tasks):
            raise UserError(
                f"the run has {len(tasks)} tasks, and --max-tasks={max_tasks} leaves no room for"
                " all of them; give at least their number."
            )
        adapters = jax.device_get(run.variables["adapters"])
        method, adapters = flat_prefixes(parse_method(run.experiment.config.method), adapters)
        width = max(_OUTPUTS, *(task.num_outputs for task in tasks))
        model = run.experiment.encoder().clone(num_outputs=(width,) * max_tasks, method=method)
        rows = parallel.put(task_axis.with_room(adapters, max_tasks, width))
        params = run.variables["params"]
        lower = LowerLayers.of(model, params, parallel)
        return cls(
            run.experiment,
            run.base,
            run.text_encoder,
            parallel,
            model,
            {"params": params, "adapters": rows},
            QueuePacking(run.experiment.queue_placing(parallel.shards), {}),
            lower if lower.depth else None,
        )

    # ------------------------------------------------ answers

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Text]:
        """The tokens of texts or pairs."""
        split = self.text_encoder(Examples(list(texts), None))
        return [Text(split.alone(i)) for i in range(len(split))]

    def choose(self, waiting: Sequence[Item]) -> Plan:
        """The next batch of the items that wait, the oldest first: see `QueuePacking`."""
        tasks = np.array([item.row for item in waiting])
        lengths = np.array([item.text.length for item in waiting])
        chosen, placement = self.queue.next_batch(tasks, lengths)
        return Plan(chosen.tolist(), [waiting[i] for i in chosen.tolist()], placement)

    def compute(self, plan: Plan) -> np.ndarray:
        """The logits of the items, float32 [n, C]; what lies beyond a task's outputs is not its."""
        texts = [item.text for item in plan.items]
        tasks = np.array([item.row for item in plan.items])
        self._compute_lower(texts)
        logits = self._logits(self._batch(texts, tasks, plan.placement))
        return logits[plan.placement.row, plan.placement.slot]

    def _compute_lower(self, texts: Sequence[Text]) -> None:
        """The hidden states below the first adapter of these texts, once for each text."""
        missing = list({id(x): x for x in texts if x.split.hidden is None}.values())
        if self.lower is None or not missing:
            return
        lengths = np.array([text.length for text in missing])
        for indices, place in self.queue.packed.batches(lengths):
            some = [missing[i] for i in indices]
            hidden = self.lower(self._batch(some, np.zeros_like(indices), place))
            for text, row, start in zip(some, place.row, place.start, strict=True):
                states = hidden[row, start : start + text.length].copy()
                text.split = dataclasses.replace(text.split, hidden=states)

    def _batch(self, texts: Sequence[Text], tasks: np.ndarray, placement: Placement) -> Batch:
        layout, shards = self.experiment.layout, self.parallel.shards
        return mixed_batch([(x.split, 0) for x in texts], tasks, placement, layout, shards)

    def _logits(self, batch: Batch) -> np.ndarray:
        return np.asarray(self._step((self.variables, None), batch))

    # ------------------------------------------------ tasks

    @property
    def most_bytes(self) -> int:
        """The largest size of a task file of this model."""
        leaves = jax.tree.leaves(self.variables["adapters"])
        return sum(x.nbytes // len(x) for x in leaves) + _METADATA

    def read(self, path: Path) -> NewTask:
        """The task of a file; compiles nothing.

        Raises:
            UserError: if it is not a task file or is damaged, belongs to another encoder, has
                another method, more labels than there is room for, longer texts, or no head.
        """
        loaded = task_file.load_another(path, self.base, self.model.method)
        (task,) = loaded.tasks
        width, max_length = self.model.num_outputs[0], self.experiment.config.data.max_length
        if not task.has_head:
            raise UserError(f"{path} holds a task without a head, which answers nothing.")
        if task.num_outputs > width:
            raise UserError(
                f"{path} holds a task with {task.num_outputs} labels, and there is room for"
                f" {width}; make a run with it, and serve that."
            )
        if (trained := loaded.max_lengths["max_length"]) > max_length:
            raise UserError(
                f"{path} was trained on texts of {trained} tokens, and texts are"
                f" truncated at {max_length} here; make a run with it, and serve that."
            )
        return NewTask(task, task_axis.with_room(loaded.variables["adapters"], 1, width))

    def write(self, row: int, adapters: Any) -> None:
        """Makes these, leaves [1, ...], the parameters of a row of the task axis, in place."""
        index = np.array([row], np.int32)
        written = self._write(self.variables["adapters"], index, adapters)
        self.variables = {**self.variables, "adapters": written}

    # ------------------------------------------------ what is compiled

    def warm_up(self) -> None:
        """Compiles everything that is ever used, and measures the seconds of each shape."""
        _ = self.base.fingerprints
        self.write(0, jax.tree.map(lambda x: np.asarray(x)[:1], self.variables["adapters"]))
        for shape in self.queue.packed.shapes:
            self.queue.seconds[shape] = min(
                self._timed(shape) for _ in range(1 + _TIMED)
            )  # the first compiles

    def _timed(self, shape: Shape) -> float:
        """The seconds of a batch of that shape, from its tokens."""
        zero, slots = np.zeros(1, np.int64), shape.length // self.queue.packed.least
        placement = Placement(shape, slots, zero, zero, zero)
        batch = self._batch(self.encode([("",)]), zero, placement)
        began = time.perf_counter()
        if self.lower is not None:
            batch = batch.replace(hidden=self.parallel.shards.split(self.lower(batch)))
        self._logits(batch)
        return time.perf_counter() - began

    @functools.cached_property
    def _step(self) -> Any:
        return self.parallel.compile(make_eval_step(self.model, self.parallel.axis_name))

    @functools.cached_property
    def _write(self) -> Any:
        # With another sharding than before, the next step would be compiled again.
        return jax.jit(task_axis.scatter, donate_argnums=0, out_shardings=self.parallel.here)
