"""An experiment: a configuration with its tasks and the encoder's architecture resolved.

`pals_jax.experiment.workdir` saves it next to the checkpoints, so that evaluation and prediction
need only the workdir.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from pals_jax.convert import huggingface
from pals_jax.data.batch import Batch
from pals_jax.data.batches import Layout, TrainBatches, eval_batches, sizes
from pals_jax.data.examples import Examples
from pals_jax.data.metrics import CORRELATIONS, METRICS, TEXT_METRICS
from pals_jax.data.own_tasks import own_files, own_task
from pals_jax.data.packing import Packed, Padded
from pals_jax.data.sampler import Sampler
from pals_jax.data.sources import Source, source_of
from pals_jax.data.tasks import KNOWN, Task, known_task
from pals_jax.data.tokenize import encode_once
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.families import Family, Tokenizer, family_of
from pals_jax.experiment.optim import make_optimizer
from pals_jax.models.adapters.parse import parse_method, title
from pals_jax.models.adapters.spec import prompt_length
from pals_jax.models.architectures import Architecture, Model, new_model
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.shapes import adapter_shapes
from pals_jax.models.stack import lowest_layers
from pals_jax.runtime.division import Division
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.shards import Shards


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is about.

    Attributes:
        config: the configuration.
        tasks: the tasks in the order of the task axis; tasks not in `config.tasks` come from the
            run that this one is based on, and are not trained.
        architecture: the architecture of the encoder or encoder-decoder.
    """

    config: ConfigDict
    tasks: tuple[Task, ...]
    architecture: Architecture

    @classmethod
    def from_config(cls, config: ConfigDict, base: "Experiment | None" = None) -> "Experiment":
        """Resolves names; reads data only if needed to find the labels of own tasks.

        Args:
            config: the configuration.
            base: an experiment to which the tasks of `config` are added.

        Raises:
            UserError: if the encoder, method, optimiser, schedule or sampling is unknown, a task is
                unknown, wrongly declared or not for such a model, the configuration would change
                the base's tasks, or it asks to cache hidden states below the first adapter although
                no layer lies there.
        """
        if not config.tasks or len(set(config.tasks)) < len(config.tasks):
            raise UserError(f"configuration: tasks {list(config.tasks)} is empty or repeats one.")
        tasks = tuple(_task(config.data, name) for name in config.tasks)
        for task in tasks:
            _check_metrics(task)
        if base is None:
            experiment = cls(config, tasks, huggingface.architecture(config.encoder))
        else:
            _check_base(config, base)
            config = config.copy_and_resolve_references()
            for task in base.tasks:
                if task.name in base.config.data.own:
                    with config.unlocked():
                        config.data.own[task.name] = base.config.data.own[task.name]
            experiment = cls(config, base.tasks + tasks, base.architecture)
        _check_outputs(experiment)
        _check_below(experiment)
        experiment.model()  # these calls raise for unknown names
        experiment.optimizer()
        experiment.sampler([1] * len(config.tasks))
        return experiment

    @property
    def trained(self) -> tuple[Task, ...]:
        """The tasks that are trained, which are last on the task axis."""
        return self.tasks[len(self.tasks) - len(self.config.tasks) :]

    @property
    def family(self) -> Family:
        """What depends on whether it is about an encoder or an encoder-decoder."""
        return family_of(self.architecture)

    def model(self) -> Model:
        """The model, without weights."""
        return new_model(
            self.architecture,
            tuple(task.num_outputs for task in self.tasks),
            parse_method(self.config.method),
            jnp.dtype(self.config.dtype),
            self.config.remat,
        )

    def encoder(self) -> MultiTaskModel:
        """The model of tasks with heads.

        Raises:
            UserError: if the experiment is about an encoder-decoder, whose tasks have none.
        """
        model = self.model()
        if not isinstance(model, MultiTaskModel):
            raise UserError(
                f"{self.config.encoder} is an encoder-decoder, whose tasks are answered with texts;"
                " this is for encoders only, whose tasks have heads."
            )
        return model

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return int(self.config.epochs * self.config.steps_per_epoch)

    def optimizer(
        self, learning_rate: Any = None, division: Division | None = None
    ) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
        """The optimiser and its schedule.

        Args:
            learning_rate: overrides the peak; it may be traced.
            division: how weights are divided among devices; None: they are not.
        """
        settings = self.config.optimizer
        if learning_rate is not None:
            settings = ConfigDict(settings.to_dict() | {"learning_rate": learning_rate})
        totals = (division or Division()).totals
        return make_optimizer(settings, len(self.tasks), self.steps, totals)

    @property
    def layout(self) -> Layout:
        """The token layout that the model expects."""
        return self.family.layout

    def sampler(self, sizes: Sequence[int]) -> Sampler:
        """The sampler of the run; `sizes` are the trained tasks' numbers of training examples."""
        config = self.config
        return Sampler(
            sizes=tuple(sizes),
            schedule=config.sampling,
            seed=config.seed,
            epochs=config.epochs,
            steps_per_epoch=config.steps_per_epoch,
            groups=config.groups,
            group_size=config.batch_size // config.groups,
        )

    def train_batches(
        self, splits: Sequence[TokenizedSplit], sampler: Sampler | None, shards: Shards
    ) -> TrainBatches:
        """Makes training batches from the sampler's draws and the splits of the trained tasks.

        The shapes of packed batches are chosen from the sampler's draws; without a sampler, batches
        are padded to the full length.
        """
        config, num_tasks = self.config, len(self.tasks)
        placing: Padded | Packed = Padded(config.batch_size, self.room, shards.total)
        if config.packing and sampler is not None:
            placing = Packed.choose(
                (sizes(splits, sampler.draw(step)) for step in sampler.spread()),
                sampler.steps,
                config.batch_size,
                self.room,
                self.architecture.stacks["encoder"].hidden_size,
                shards.total,
                self._prompts,
                self.family.target_cost,
            )
        return TrainBatches(
            splits,
            self.layout,
            placing,
            shards,
            first_task=num_tasks - len(splits),
            num_tasks=num_tasks,
        )

    def eval_batches(
        self, split: TokenizedSplit, task_id: int, shards: Shards
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """The batches of a split's evaluation: see `data.batches.eval_batches`."""
        rows = self.config.eval_batch_size
        placing: Padded | Packed = Padded(rows, self.room, shards.total)
        if self.config.packing:
            placing = Packed.into(rows, self.room, shards.total, self._prompts)
        return eval_batches(split, task_id, self.layout, placing, shards)

    def answer_batches(
        self, split: TokenizedSplit, task_id: int, shards: Shards
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """As `eval_batches`, for any number of texts, in few shapes: see `Packed.few`."""
        rows, max_length = self.config.eval_batch_size, self.config.data.max_length
        placing = Packed.few(rows, max_length, shards.total, self._prompts)
        return eval_batches(split, task_id, self.layout, placing, shards)

    def queue_placing(self, shards: Shards) -> Packed:
        """How examples of any tasks that wait in a queue are placed in rows."""
        rows, max_length = self.config.eval_batch_size, self.config.data.max_length
        return Packed.grid(rows, max_length, shards.total, self._prompts)

    @property
    def room(self) -> tuple[int, ...]:
        """The maximum tokens of an example, or of its source and of its target."""
        return tuple(self.family.max_lengths(self.config.data).values())

    @property
    def _prompts(self) -> int:
        """The number of prompt positions that the model adds to each example."""
        return prompt_length(parse_method(self.config.method))

    def knows_data(self, task: Task) -> bool:
        """Whether the task's data source is known; it is not for a task loaded from a file."""
        return bool(task.text) and (task.name in self.config.data.own or task.name in KNOWN)

    def source(self, task: Task) -> Source:
        """Where a task's examples come from."""
        data = self.config.data
        if task.name in data.own:
            return own_files(data.own[task.name])
        if not self.knows_data(task):
            raise UserError(
                f"the data of task {task.name} are not known: a run made from task files can only"
                " predict; evaluate the run in which it was trained."
            )
        return source_of(data.source, Path(data.dir).expanduser() if data.dir else None)

    @property
    def cache_dir(self) -> Path:
        """The directory where tokens and hidden states are cached."""
        return Path(self.config.data.cache_dir).expanduser()

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of `config.encoder`.

        Raises:
            UserError: if there is none.
        """
        return self.family.load_tokenizer(huggingface.resolve(self.config.encoder))

    def read(self, task: Task, split: str, tokenizer: Tokenizer) -> TokenizedSplit:
        """The examples of a split, tokenised or from the cache.

        Raises:
            UserError: if the data are missing or invalid.
        """
        encoder = self.family.text_encoder(tokenizer, task, self.config.data)
        return encode_once(self.source(task).read(task, split), encoder, self.cache_dir)

    def eval_splits(self, task: Task) -> list[str]:
        """The evaluation splits that the source has.

        Raises:
            UserError: if there is none.
        """
        present = self.source(task).splits(task)
        splits = [split for split in task.eval_splits if split in present]
        if not splits:
            wanted = " or ".join(task.eval_splits) or "dev"
            raise UserError(f"task {task.name} has no {wanted} split to evaluate on.")
        return splits

    def read_eval(self, task: Task, tokenizer: Tokenizer) -> dict[str, TokenizedSplit]:
        """The examples of the evaluation splits, as `read` gives them."""
        return {split: self.read(task, split, tokenizer) for split in self.eval_splits(task)}

    def eval_examples(self, task: Task) -> dict[str, Examples]:
        """The examples of the evaluation splits as texts."""
        return {split: self.source(task).read(task, split) for split in self.eval_splits(task)}


def _check_base(config: ConfigDict, base: Experiment) -> None:
    if not config_lib.encoder_is_frozen(config):
        raise UserError(
            "configuration: with --base the encoder must stay frozen, or the earlier tasks would"
            " change; set trainable to ('adapters/',)."
        )
    fixed = {"dtype": (config.dtype, base.config.dtype)} | {
        f"data.{name}": (length, base.config.data[name])
        for name, length in base.family.max_lengths(config.data).items()
    }
    for key, (mine, theirs) in fixed.items():
        if mine != theirs:
            raise UserError(
                f"configuration: {key} is {mine}, but {theirs} in the base run; a different value"
                " would change the predictions of the earlier tasks."
            )
    not_own = (task.name for task in base.tasks if task.name not in base.config.data.own)
    known = [name for name in not_own if name in KNOWN]
    if known and config.data.source != base.config.data.source:
        raise UserError(
            f"configuration: data.source is {config.data.source}, but {base.config.data.source} in"
            f" the base run, whose tasks {', '.join(known)} are read from there."
        )
    if parse_method(config.method) != parse_method(base.config.method):
        raise UserError(
            f"configuration: method is {title(config.method)}, but {title(base.config.method)} in"
            " the base run; all tasks of a model share a method."
        )
    if again := [task.name for task in base.tasks if task.name in config.tasks]:
        raise UserError(f"the base run already has a task {again[0]!r}; rename the new one.")


def _check_below(experiment: Experiment) -> None:
    """If lower_dropout is False, checks that frozen layers exist below the first adapter."""
    config = experiment.config
    if config.lower_dropout:
        return
    if not config_lib.encoder_is_frozen(config):
        raise UserError(
            "configuration: lower_dropout is False, but the encoder is trained, so hidden states"
            " change at every step and cannot be cached; set trainable to ('adapters/',), or"
            " lower_dropout to True."
        )
    lowest = lowest_layers(adapter_shapes(experiment.model()))
    if lowest and min(lowest.values()) == 0:
        parts = ", ".join(name for name, layer in lowest.items() if layer == 0)
        raise UserError(
            f"configuration: lower_dropout is False, but method {title(config.method)} has no"
            f" layer below its {parts} that is the same for all tasks; start it at a higher layer,"
            ' for example with layers="final_half", or set lower_dropout to True.'
        )


def _check_outputs(experiment: Experiment) -> None:
    """Refuses a task whose answers are not of a kind that the model gives."""
    outputs, config = experiment.family.outputs, experiment.config
    for task in experiment.trained:
        if task.output in outputs:
            continue
        if task.output == "text":
            raise UserError(
                f"task {task.name} is answered with texts, which the encoder {config.encoder} does"
                " not write; name an encoder-decoder (BART, mBART or Marian), or declare a label"
                " instead of a target."
            )
        raise UserError(
            f"task {task.name} is answered with {task.output}, and the encoder-decoder"
            f" {config.encoder} writes texts; name an encoder (BERT or RoBERTa), or declare a"
            " target instead of a label."
        )
    if config.label_smoothing and "text" not in outputs:
        raise UserError(
            f"configuration: label_smoothing is {config.label_smoothing}, which is only for the"
            " texts of encoder-decoders; set it to 0."
        )


def _check_metrics(task: Task) -> None:
    known = TEXT_METRICS if task.output == "text" else METRICS
    unknown = [name for name in task.metrics if name not in known]
    if unknown or not task.metrics:
        raise UserError(
            f"task {task.name} has the metrics {list(task.metrics)}; known are {', '.join(known)}."
        )
    if task.output == "text":
        return
    wrong = [name for name in task.metrics if (name in CORRELATIONS) != task.is_regression]
    if wrong or ("f1" in task.metrics and task.num_outputs != 2):
        raise UserError(
            f"task {task.name} asks for {', '.join(wrong) or 'f1'}, which does not fit it:"
            f" {', '.join(CORRELATIONS)} are for regression, the others for classification, f1 for"
            " two classes."
        )


def _task(data: ConfigDict, name: str) -> Task:
    """The task declared in `data.own`, or else the known task of that name."""
    return own_task(name, data.own[name])[0] if name in data.own else known_task(name)
