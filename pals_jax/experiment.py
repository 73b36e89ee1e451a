"""An experiment: a configuration with the tasks and the architecture that it means.

It is saved beside the checkpoints, so that a workdir is all that evaluation and prediction need.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from pals_jax import config as config_lib
from pals_jax.convert import huggingface
from pals_jax.data.batches import Layout
from pals_jax.data.files import own_files, own_task
from pals_jax.data.sources import Source, glue_source
from pals_jax.data.tasks import GLUE, Task, glue_task
from pals_jax.data.tokenize import TokenizedSplit, tokenize_split
from pals_jax.errors import UserError
from pals_jax.metrics import CORRELATIONS, METRICS
from pals_jax.models import methods
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel

FILE = "experiment.json"
# What may differ when a run goes on: where things lie, not what they are.
_MAY_DIFFER = (
    r"config\.(encoder|data\.dir|data\.cache_dir|eval_batch_size|checkpoint_every"
    r"|data\.own\.[^.]+\.(train|dev|test))$"
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is about.

    Attributes:
        config: the configuration.
        tasks: in the order of the task axis; those that `config.tasks` does not name came with
            the run that this one is based on, and are left as they are.
        architecture: of the encoder.
    """

    config: ConfigDict
    tasks: tuple[Task, ...]
    architecture: BertConfig

    @classmethod
    def from_config(cls, config: ConfigDict, base: "Experiment | None" = None) -> "Experiment":
        """Resolves names; reads no more data than a task's own labels need.

        Args:
            config: the configuration.
            base: an experiment to whose tasks those of `config` are added.

        Raises:
            UserError: an unknown encoder, a task that is unknown or wrongly declared, or a
                configuration under which the base's tasks would not stay as they are.
        """
        if not config.tasks or len(set(config.tasks)) < len(config.tasks):
            raise UserError(f"configuration: tasks {list(config.tasks)} is empty or repeats one.")
        tasks = tuple(_task(config.data, name) for name in config.tasks)
        for task in tasks:
            _check_metrics(task)
        if base is None:
            return cls(config, tasks, huggingface.architecture(config.encoder))
        _check_base(config, base)
        config = config.copy_and_resolve_references()
        for task in base.tasks:
            if task.name in base.config.data.own:
                with config.unlocked():
                    config.data.own[task.name] = base.config.data.own[task.name]
        return cls(config, base.tasks + tasks, base.architecture)

    @property
    def trained(self) -> tuple[Task, ...]:
        """The tasks that are trained here, the last ones of the task axis."""
        return self.tasks[len(self.tasks) - len(self.config.tasks) :]

    def model(self) -> MultiTaskModel:
        """The model, without weights."""
        return MultiTaskModel(
            self.architecture,
            tuple(task.num_outputs for task in self.tasks),
            methods.parse(self.config.method),
            jnp.dtype(self.config.dtype),
            self.config.remat,
        )

    @property
    def layout(self) -> Layout:
        """What the encoder takes."""
        encoder = self.architecture
        return Layout(self.config.data.max_length, encoder.pad_token_id, encoder.type_vocab_size)

    def source(self, task: Task) -> Source:
        """Where a task's examples come from."""
        data = self.config.data
        if task.name in data.own:
            return own_files(data.own[task.name])
        if task.name not in GLUE:
            raise UserError(
                f"the data of task {task.name} are not known: a run that was made of task files"
                " predicts only; evaluate the run in which it was trained."
            )
        return glue_source(data.source, Path(data.dir).expanduser() if data.dir else None)

    def read(self, task: Task, split: str, tokenizer: PreTrainedTokenizerFast) -> TokenizedSplit:
        """The examples of a split, tokenised or out of the cache.

        Raises:
            UserError: the data are missing or wrong.
        """
        examples = self.source(task).read(task, split)
        cache_dir = Path(self.config.data.cache_dir).expanduser()
        return tokenize_split(examples, tokenizer, self.config.data.max_length, cache_dir)

    def read_eval(
        self, task: Task, tokenizer: PreTrainedTokenizerFast
    ) -> dict[str, TokenizedSplit]:
        """The evaluation splits that the source has, of which there must be one."""
        present = self.source(task).splits(task)
        splits = [split for split in task.eval_splits if split in present]
        if not splits:
            wanted = " or ".join(task.eval_splits) or "dev"
            raise UserError(f"task {task.name} has no {wanted} split to evaluate on.")
        return {split: self.read(task, split, tokenizer) for split in splits}

    def check(self, workdir: Path) -> None:
        """Sees that no other experiment is in the workdir.

        Raises:
            UserError: there is one; it names the keys that differ.
        """
        path = workdir / FILE
        if not path.exists():
            return
        saved, mine = (_flat(x._to_json()) for x in (Experiment.load(workdir), self))
        differing = sorted(
            key
            for key in saved.keys() | mine.keys()
            if saved.get(key) != mine.get(key) and not re.match(_MAY_DIFFER, key)
        )
        if differing:
            raise UserError(
                f"{workdir} belongs to another experiment, which differs in"
                f" {', '.join(differing)}; use another workdir, or the same configuration."
            )

    def save(self, workdir: Path) -> None:
        """Writes it to the workdir, which is made if need be."""
        workdir.mkdir(parents=True, exist_ok=True)
        part = workdir / f"{FILE}.part"
        part.write_text(json.dumps(self._to_json(), indent=1))
        part.rename(workdir / FILE)

    @classmethod
    def load(cls, workdir: Path) -> "Experiment":
        """The experiment of a workdir; keys that were not known then have their defaults.

        Raises:
            UserError: none is there, or its file is damaged.
        """
        path = workdir / FILE
        try:
            saved = json.loads(path.read_text())
            config = config_lib.from_json(saved["config"])
            tasks = tuple(Task.from_json(task) for task in saved["tasks"])
            return cls(config, tasks, BertConfig(**saved["architecture"]))
        except FileNotFoundError:
            raise UserError(f"{workdir} is not the workdir of a run: it has no {FILE}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}).") from error

    def _to_json(self) -> dict[str, Any]:
        return {
            "config": config_lib.to_json(self.config),
            "tasks": json.loads(json.dumps([dataclasses.asdict(task) for task in self.tasks])),
            "architecture": dataclasses.asdict(self.architecture),
        }


def _check_base(config: ConfigDict, base: Experiment) -> None:
    if tuple(config.trainable) != ("adapters/",):
        raise UserError(
            "configuration: with --base the encoder must stay as it is, or the earlier tasks would"
            " change; set trainable to ('adapters/',)."
        )
    for key, mine, theirs in (
        ("dtype", config.dtype, base.config.dtype),
        ("data.max_length", config.data.max_length, base.config.data.max_length),
    ):
        if mine != theirs:
            raise UserError(
                f"configuration: {key} is {mine}, that of the base run {theirs}; another one would"
                " change the answers of the earlier tasks."
            )
    of_glue = [task.name for task in base.tasks if task.name not in base.config.data.own]
    if of_glue and config.data.source != base.config.data.source:
        raise UserError(
            f"configuration: data.source is {config.data.source}, that of the base run"
            f" {base.config.data.source}, which its tasks {', '.join(of_glue)} are read from."
        )
    if methods.parse(config.method) != methods.parse(base.config.method):
        raise UserError(
            f"configuration: method is {config.method}, that of the base run"
            f" {base.config.method}; all tasks of a model share a method."
        )
    if again := [task.name for task in base.tasks if task.name in config.tasks]:
        raise UserError(f"the base run has a task {again[0]!r} already; give the new one a name.")


def _check_metrics(task: Task) -> None:
    unknown = [name for name in task.metrics if name not in METRICS]
    if unknown or not task.metrics:
        raise UserError(
            f"task {task.name} has the metrics {list(task.metrics)};"
            f" known are {', '.join(METRICS)}."
        )
    wrong = [name for name in task.metrics if (name in CORRELATIONS) != task.is_regression]
    if wrong or ("f1" in task.metrics and task.num_outputs != 2):
        raise UserError(
            f"task {task.name} asks for {', '.join(wrong) or 'f1'}, which does not fit it:"
            f" {', '.join(CORRELATIONS)} are for regression, the others for classes, f1 for two."
        )


def _task(data: ConfigDict, name: str) -> Task:
    """A task of your own where `data.own` declares it; else one of GLUE's."""
    return own_task(name, data.own[name])[0] if name in data.own else glue_task(name)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
