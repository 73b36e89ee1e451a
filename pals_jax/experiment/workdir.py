"""The workdir of a run: saving, loading, and refusing a workdir that does not match.

A workdir holds experiment.json and tokenizer/ (this module), checkpoints/ and best/
(`experiment.checkpoint`), metrics.jsonl and tensorboard/ (`training.metric_writer`).
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from pals_jax.data.tasks import Task
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.families import Tokenizer
from pals_jax.models.architectures import architecture_of
from pals_jax.runtime import storage
from pals_jax.runtime.errors import UserError

EXPERIMENT_FILE = "experiment.json"
_SIZES = "train_examples"
_TOKENIZER = "tokenizer"
# Keys that may change when a run is resumed: paths and execution, not the experiment itself.
_MAY_DIFFER = (
    r"config\.(encoder|data\.dir|data\.cache_dir|eval_batch_size|checkpoint_every|packing|sweep"
    r"|generation\.\w+|data\.own\.[^.]+\.(train|dev|test))$"
)


def refuse_another_experiment(experiment: Experiment, workdir: epath.Path) -> None:
    """Refuses a workdir that holds another experiment.

    Raises:
        UserError: if it does; the message names the keys that differ. Also if there is no such
            bucket.
    """
    storage.check(workdir)
    path = workdir / EXPERIMENT_FILE
    if not path.exists():
        return
    saved, mine = (
        flatten_dict(_to_json(x), keep_empty_nodes=True, sep=".")
        for x in (load(workdir), experiment)
    )
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


def refuse_other_sizes(experiment: Experiment, workdir: epath.Path, sizes: Sequence[int]) -> None:
    """Refuses training data of a different size than the run in the workdir started with.

    Raises:
        UserError: if a size differs, since the sampler's draws depend on the sizes.
    """
    path = workdir / EXPERIMENT_FILE
    with storage.reported(workdir):
        saved = json.loads(path.read_text()).get(_SIZES) if path.exists() else None
    for task, size, before in zip(experiment.trained, sizes, saved or sizes, strict=True):
        if size != before:
            raise UserError(
                f"the run in {workdir} started with {before} training examples of {task.name},"
                f" and there are {size} now; use another workdir, or the original data."
            )


def refuse_vanished(workdir: epath.Path) -> None:
    """Refuses a workdir that no longer exists, or is not the one that host 0 writes to.

    Raises:
        UserError: if this host cannot see the run's files.
    """
    with storage.reported(workdir):
        there = (workdir / EXPERIMENT_FILE).is_file()
    if not there:
        raise UserError(
            f"{workdir} has vanished, or this host does not see the files that host 0 writes;"
            " restore it, or use a workdir that all hosts see, and run the same command again."
        )


def save(experiment: Experiment, workdir: epath.Path, sizes: Sequence[int] = ()) -> None:
    """Writes experiment.json to the workdir, which is created if missing.

    Args:
        experiment: what the run is about.
        workdir: see `storage.workdir`.
        sizes: the trained tasks' numbers of training examples; empty if nothing is trained.
    """
    saved = _to_json(experiment) | ({_SIZES: list(sizes)} if sizes else {})
    with storage.reported(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        storage.write_text(workdir / EXPERIMENT_FILE, json.dumps(saved, indent=1))


def load(workdir: epath.Path) -> Experiment:
    """The experiment of a workdir; keys added since it was saved get their defaults.

    Raises:
        UserError: if there is none, its file is damaged, or the bucket does not respond.
    """
    storage.check(workdir)
    path = workdir / EXPERIMENT_FILE
    with storage.reported(path):
        text = path.read_text() if path.exists() else None
    if text is None:
        raise UserError(f"{workdir} is not the workdir of a run: it has no {EXPERIMENT_FILE}.")
    try:
        saved = json.loads(text)
        config = config_lib.from_json(saved["config"])
        tasks = tuple(Task.from_json(task) for task in saved["tasks"])
        return Experiment(config, tasks, architecture_of(saved["architecture"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error


def save_tokenizer(tokenizer: Tokenizer, workdir: epath.Path) -> None:
    """Writes the tokenizer of a run, for `saved_tokenizer` to read."""
    with storage.Staged(workdir / _TOKENIZER) as folder:
        tokenizer.save_pretrained(folder.path)


def saved_tokenizer(experiment: Experiment, workdir: epath.Path) -> Tokenizer:
    """The tokenizer of the run of an experiment.

    Raises:
        UserError: if it is missing or damaged.
    """
    with storage.fetched(workdir / _TOKENIZER) as folder:
        return experiment.family.read_tokenizer(folder)


def _to_json(experiment: Experiment) -> dict[str, Any]:
    return {
        "config": config_lib.to_json(experiment.config),
        "tasks": json.loads(json.dumps([dataclasses.asdict(task) for task in experiment.tasks])),
        "architecture": dataclasses.asdict(experiment.architecture),
    }
