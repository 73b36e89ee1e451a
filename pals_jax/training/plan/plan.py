"""Planning a run on a TPU without having one, by compiling the run's actual steps.

`libtpu` can compile for any TPU on a machine without one. The compiled steps show whether they fit
in memory and what they compute, move and exchange; together with the chips' public figures this
gives an estimate of the run's time and cost.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from pals_jax.data.batch import Batch
from pals_jax.data.packing import Shape
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenized import TokenizedSplit, TokenizedTargets
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.hidden_cache import as_if_kept
from pals_jax.inference.steps import make_eval_step, make_text_loss_step
from pals_jax.models.compute_dtype import in_compute_dtype
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.shapes import variable_shapes
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel
from pals_jax.runtime.shards import Shards
from pals_jax.training.plan import flops, hlo
from pals_jax.training.plan.ahead_of_time import Compiled, compile_step
from pals_jax.training.plan.breakdown import by_part
from pals_jax.training.plan.tpus import KINDS, Kind
from pals_jax.training.step import TrainState, create_state, partition, train_step_of

_LINKS = 2  # links per chip that a ring of all chips uses

ASSUMPTIONS = (
    "The step is that of the commonest batch shape of the training data, and the length of the run"
    " is that of the mean shape; without the data or the tokenizer on this machine, every batch is"
    " padded to the full length, which overestimates both.",
    "A step takes the cycles that the compiler estimates for each of its operations or, if that is"
    " longer or nothing is estimated, the roofline: each chip reaches the peak FLOP/s of bfloat16,"
    " in which JAX multiplies float32 too, or the peak bandwidth of its memory, whichever takes"
    " longer; what XLA counts as moved may in part stay on the chip.",
    "All-reduces go around a ring of all chips over two links of each, and overlap with nothing.",
    "Reading data, what is computed once for each example, evaluation, checkpoints and compilation"
    " are not in the length of the run.",
)


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """A compiled step and estimates derived from it.

    Attributes:
        kind: the TPU that it was compiled for.
        examples: the number of examples in its batch.
        shape: rows, and positions per row, or per row of sources and of targets.
        model_flops: FLOPs of the model's matrix products, over all rows.
        compiled: the compiled step.
    """

    kind: Kind
    examples: int
    shape: Shape
    model_flops: int
    compiled: Compiled

    @property
    def program(self) -> hlo.Program:
        """The work of one device."""
        return self.compiled.program

    @property
    def flops(self) -> float:
        """Operations on all devices."""
        return self.program.flops * self.kind.devices

    @property
    def model_share(self) -> float:
        """The fraction of `flops` that are the model's matrix products."""
        return self.model_flops / self.flops

    @property
    def utilisation(self) -> float:
        """`model_flops` per second of a step, of the chips' peak.

        "Model FLOPs utilisation", Chowdhery et al. 2022, section 4.1.
        """
        return self.model_flops / (self.seconds * self.kind.chips * self.kind.chip.flops)

    @property
    def bytes_moved(self) -> float:
        """Bytes moved per chip."""
        return self.program.bytes_moved * self.kind.chip.devices

    @property
    def arguments(self) -> int:
        """Bytes of arguments per chip."""
        return self.compiled.arguments * self.kind.chip.devices

    @property
    def temporaries(self) -> int:
        """Peak bytes of temporaries per chip."""
        return self.compiled.temporaries * self.kind.chip.devices

    @property
    def seconds_computing(self) -> float:
        """The time of the operations at the chips' peak."""
        return self.flops / (self.kind.chips * self.kind.chip.flops)

    @property
    def seconds_moving(self) -> float:
        """The time of the memory traffic at the chips' bandwidth."""
        return self.bytes_moved / self.kind.chip.bandwidth

    @property
    def seconds_exchanging(self) -> float:
        """The time of collectives on a ring of chips: one pass, or two for an all-reduce."""
        # The result of a reduce-scatter is one device's part of what is summed.
        passes = {"all-reduce": 2, "reduce-scatter": self.kind.devices}
        size = sum(passes.get(name, 1) * n for name, (_, n) in self.program.exchanges.items())
        return size * (1 - 1 / self.kind.chips) / (_LINKS * self.kind.chip.link)

    @property
    def roofline(self) -> float:
        """The seconds of a step at the chips' peaks: see `ASSUMPTIONS`."""
        return max(self.seconds_computing, self.seconds_moving) + self.seconds_exchanging

    @property
    def without_estimate(self) -> str | None:
        """Why the compiler's estimate of the time is unknown, in a sentence; None if known."""
        if not self.program.operations:
            return "this libtpu estimates no cycles, so the time of a step is its roofline."
        if self.kind.chip.clock is None:
            return (
                f"the clock of {self.kind.chip.name} is not public; a step's time is its roofline."
            )
        return None

    @property
    def seconds_by_part(self) -> Mapping[str, float]:
        """The compiler's estimate of the time of each part of a step, exchanges last.

        Empty if it is unknown.
        """
        clock = self.kind.chip.clock
        if clock is None or self.without_estimate:
            return {}
        seconds = {part: cycles / clock for part, cycles in by_part(self.program).items()}
        return {**seconds, "exchanges": self.seconds_exchanging}

    @property
    def seconds(self) -> float:
        """The estimated time of a step: the larger of roofline and compiler's estimate."""
        return max(self.roofline, sum(self.seconds_by_part.values()))

    def to_json(self) -> dict[str, Any]:
        """All of it, for --json."""
        return {
            "examples": self.examples,
            "rows": self.shape.rows,
            "length": self.shape.length,
            **({"target_length": self.shape.room[1]} if len(self.shape.room) > 1 else {}),
            "flops": self.flops,
            "model_flops": self.model_flops,
            "model_share": self.model_share,
            "bytes_moved_per_chip": self.bytes_moved,
            "argument_bytes_per_chip": self.arguments,
            "temporary_bytes_per_chip": self.temporaries,
            "exchanges": {
                name: {"count": count, "bytes": size}
                for name, (count, size) in self.program.exchanges.items()
            },
            "host_transfers": self.program.host_transfers,
            "compile_seconds": self.compiled.seconds,
            "seconds_computing": self.seconds_computing,
            "seconds_moving": self.seconds_moving,
            "seconds_exchanging": self.seconds_exchanging,
            "seconds_roofline": self.roofline,
            "seconds_by_part": self.seconds_by_part,
            "cycles_by_part": by_part(self.program),
            "seconds": self.seconds,
            "utilisation": self.utilisation,
            "examples_per_second": self.examples / self.seconds,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resources that a run needs.

    Attributes:
        topology: a key of `tpus.KINDS`.
        train: the training step.
        evaluation: the evaluation step.
        steps: the number of training steps.
        mean_batch: the mean positions per batch of the run, as a fraction of the planned batch's.
        price: USD per hour of the whole TPU, if known.
    """

    topology: str
    train: StepEstimate
    evaluation: StepEstimate
    steps: int
    mean_batch: float
    price: float | None

    @property
    def kind(self) -> Kind:
        """The kind of TPU."""
        return KINDS[self.topology]

    @property
    def memory(self) -> int:
        """Peak bytes per chip; the training state stays in memory during evaluation.

        Evaluation has its own copy of trained weights, in the dtype of the computation.
        """
        evaluation = self.evaluation.arguments + self.evaluation.temporaries
        return self.train.arguments + max(self.train.temporaries, evaluation)

    @property
    def fits(self) -> bool:
        """Whether a chip has enough memory."""
        return self.memory <= self.kind.chip.hbm

    @property
    def hours(self) -> float:
        """The estimated hours of training."""
        return self.steps * self.train.seconds * self.mean_batch / 3600

    @property
    def cost(self) -> float | None:
        """The estimated cost in USD; None if the price is unknown."""
        return None if self.price is None else self.hours * self.price

    def to_json(self) -> dict[str, Any]:
        """All of it, for --json."""
        return {
            "topology": self.topology,
            "chips": self.kind.chips,
            "devices": self.kind.devices,
            "chip": self.kind.chip._asdict(),
            "train": self.train.to_json(),
            "evaluation": self.evaluation.to_json(),
            "memory_bytes_per_chip": self.memory,
            "fits": self.fits,
            "steps": self.steps,
            "mean_batch": self.mean_batch,
            "hours": self.hours,
            "usd": self.cost,
            "assumptions": ASSUMPTIONS,
        }


class _OfOneProcess(DataParallel):
    """The devices of all hosts as those of one: what is only compiled takes one process."""

    @property
    def shards(self) -> Shards:
        return Shards(len(self.devices), 0, len(self.devices))


def plan(experiment: Experiment, topology: str, price: float | None = None) -> Plan:
    """Compiles the steps of an experiment for a TPU, without allocating model or batches there.

    Args:
        experiment: the experiment to plan.
        topology: a key of `tpus.KINDS`.
        price: USD per hour of the whole TPU.

    Raises:
        UserError: if the topology is unknown, libtpu is not installed, or a step does not fit.
    """
    topology = re.sub("^v5e-", "v5litepod-", topology)  # Google Cloud uses both names
    if topology not in KINDS:
        raise UserError(f"unknown --topology={topology}; known are {', '.join(KINDS)}.")
    jax.config.update("jax_platforms", "cpu")  # leaves a TPU of this machine free for other work
    kind = KINDS[topology]
    config, model = experiment.config, experiment.model()
    shapes = variable_shapes(model)
    devices = _OfOneProcess.over(kind.compile_devices())
    parallel = devices.dividing(partition(shapes, config.trainable)[0])
    optimizer, _ = experiment.optimizer(division=parallel.division)

    def first_state(variables: optax.Params) -> TrainState:
        return create_state(variables, config.trainable, optimizer).in_compute_dtype(model.dtype)

    state = parallel.put_shapes(jax.eval_shape(first_state, shapes))
    variables = jax.eval_shape(lambda shapes: in_compute_dtype(shapes, model.dtype), shapes)
    train_step = train_step_of(experiment, optimizer, parallel.division)
    eval_step: Any
    if isinstance(model, Seq2SeqModel):
        eval_step, evaluated = make_text_loss_step(model, devices.axis_name), variables
    else:
        eval_step, evaluated = make_eval_step(model, devices.axis_name), (variables, None)
    batch, shape, mean_batch = _train_batch(experiment, devices.shards)
    compiled = parallel.compile(train_step, donate=True, like=state)
    train = compile_step(compiled, state, batch)
    eval_batch, eval_shape = _eval_batch(experiment, devices.shards)
    evaluation = compile_step(devices.compile(eval_step), evaluated, eval_batch)

    kept = not config.lower_dropout
    model_flops = shape.rows * flops.training(model, config.trainable, *shape.room, kept=kept)
    eval_flops = eval_shape.rows * flops.forward(model, *eval_shape.room, kept=kept)
    estimate = StepEstimate(kind, config.batch_size, shape, model_flops, train)
    if estimate.without_estimate:
        say(estimate.without_estimate)
    return Plan(
        topology,
        estimate,
        StepEstimate(kind, eval_shape.rows, eval_shape, eval_flops, evaluation),
        experiment.steps,
        mean_batch,
        price,
    )


def _train_batch(experiment: Experiment, shards: Shards) -> tuple[Batch, Shape, float]:
    """A batch of the most common shape, that shape, and the mean size relative to it."""
    splits = _training_data(experiment)
    if splits is None:
        config = experiment.config
        shape = Shape(config.batch_size, *experiment.room)
        examples = [_examples(experiment, 1)] * len(experiment.trained)
        batches = experiment.train_batches(examples, None, shards)
        zeros = np.zeros((config.groups, config.batch_size // config.groups), np.int64)
        return batches(Draw(zeros[:, 0].astype(np.int32), zeros)), shape, 1.0
    sampler = experiment.sampler([len(split) for split in splits])
    batches = experiment.train_batches(splits, sampler, shards)
    shapes = {number: batches.place(sampler.draw(number))[0].shape for number in sampler.spread()}
    counts = Counter(shapes.values())
    shape = max(counts, key=lambda shape: counts[shape])
    mean = np.mean([each.positions for each in shapes.values()])
    number = next(number for number in shapes if shapes[number] == shape)
    return batches(sampler.draw(number)), shape, float(mean / shape.positions)


def _training_data(experiment: Experiment) -> list[TokenizedSplit] | None:
    """The training splits; None if they, or the tokenizer, are not on this machine."""
    try:
        for task in experiment.trained:
            if not experiment.source(task).is_here(task):
                raise UserError(f"the data of {task.name} are not on this machine.")
        tokenizer = experiment.load_tokenizer()
        splits = [experiment.read(task, "train", tokenizer) for task in experiment.trained]
        return [as_if_kept(experiment, split) for split in splits]
    except UserError as error:
        say(f"every batch is assumed to be padded to the full length: {error}")
        return None


def _eval_batch(experiment: Experiment, shards: Shards) -> tuple[Batch, Shape]:
    """An evaluation batch of examples that fill a row each, and its shape."""
    examples = _examples(experiment, experiment.config.eval_batch_size)
    batch, places = next(experiment.eval_batches(examples, 0, shards))
    return batch, Shape(len(places), *experiment.room)


def _examples(experiment: Experiment, count: int) -> TokenizedSplit:
    length, *of_targets = experiment.room
    targets = None
    if of_targets:
        each = of_targets[0] + 1  # with the token that the decoder starts with
        targets = TokenizedTargets(np.zeros(count * each, np.int32), np.arange(count + 1) * each)
    split = TokenizedSplit(
        tokens=np.zeros(count * length, np.int32),
        offsets=np.arange(count + 1) * length,
        first=np.full(count, length, np.int32),
        targets=np.zeros(count, np.float32),
        target_texts=targets,
    )
    return as_if_kept(experiment, split)
