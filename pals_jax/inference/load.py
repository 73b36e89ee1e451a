"""`load`: a run from whatever a place holds, told apart by its files."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from pals_jax.convert import huggingface, task_file
from pals_jax.convert.bart import is_bart
from pals_jax.convert.task_file import Base
from pals_jax.data.tasks import Task
from pals_jax.data.tokenize import has_tokenizer, load_tokenizer
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.families import Tokenizer, family_of
from pals_jax.experiment.workdir import EXPERIMENT_FILE, saved_tokenizer
from pals_jax.experiment.workdir import load as load_experiment
from pals_jax.inference.foreign import FOREIGN, Checkpoint
from pals_jax.inference.run import Run
from pals_jax.models import task_axis
from pals_jax.models.adapters import serialize
from pals_jax.runtime import storage
from pals_jax.runtime.errors import UserError, reason


def load(
    place: str | Path,
    *,
    base: str | Path | None = None,
    format: str | None = None,
    tasks: Sequence[Task] | None = None,
) -> Run:
    """The run in a place.

    Args:
        place: one of the following.
            A workdir, local or `gs://BUCKET/DIR` ("run").
            A task file ("task"), or a directory of AdapterHub ("adapterhub") or of PEFT ("peft"),
            each with its `base`.
            A sequence classifier of Hugging Face ("huggingface"): a directory or, if the format is
            named, a hub id.
            A directory with a checkpoint of Bert-n-Pals ("bert_n_pals") or of He et al.
            ("unified_view"), or with one of Google's TensorFlow BERT ("tf_bert"), which may also be
            given as the path of its files without `.index`.
        base: the encoder that a task file or an adapter was trained on: a directory, a hub id, the
            name of a packaged encoder or, for a task file, a workdir. For another checkpoint that
            lacks a tokenizer, where to take that from.
        format: one of the words in quotation marks, if `place` holds several.
        tasks: for checkpoints of other codes, which do not tell what their heads mean: the tasks in
            the order of the heads. By default a task takes one text or a pair, its labels are
            Hugging Face's or LABEL_0, LABEL_1, ..., and the value of a regression is the output.

    Returns:
        The run, on all devices. Tasks of adapters that came without a head can `encode` but not
        `predict`.

    Raises:
        UserError: if the place holds none of these, or several and `format` is not given; if the
            base or a tokenizer is needed and missing; or if files are damaged or do not fit.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"there is no format {format!r}; formats are {', '.join(FORMATS)}.")
    path = storage.workdir(str(place))
    name = format or _format_of(path)
    needs_base = name == "task" or (name in FOREIGN and FOREIGN[name].needs_base)
    if base is None and needs_base:
        raise UserError(
            f"{place} ({name}) lacks the encoder; name the one that it was trained on with base=."
        )
    if tasks is not None and name in ("run", "task"):
        raise UserError(f"{place} ({name}) says itself what its tasks are; leave tasks= out.")
    if name == "run":
        if base is not None:
            raise UserError(f"{place} is a run, which has its own encoder; leave base= out.")
        return Run.load(path)
    origin = "" if base is None else str(storage.workdir(str(base)))
    if name == "task":
        return from_task_files([Path(path)], origin)
    if needs_base and _is_run(origin):
        raise UserError(
            f"{base} is a run; name the encoder itself, as Hugging Face has it, as the base of"
            f" {place} ({name})."
        )
    if not needs_base:
        _check_has_no_decoder(Path(path))
    return _from_checkpoint(str(path), FOREIGN[name].read(str(path), origin), origin, tasks)


def from_task_files(files: Sequence[Path], base: str) -> Run:
    """The run of any set of task files.

    Args:
        files: task files of one method.
        base: the workdir of a run, or an encoder (see `huggingface.resolve`).

    Raises:
        UserError: if a file does not fit the base or the other files.
    """
    base = str(storage.workdir(base))
    found = _base(base)
    loaded = task_file.load(files, found)
    experiment = _experiment(base, found.architecture, loaded.method, loaded.tasks)
    experiment.config.data.update(dict(loaded.max_lengths))
    generation = experiment.config.generation
    generation.max_length = min(generation.max_length, found.architecture.max_length)
    return Run.of(experiment, found.tokenizer, loaded.variables)


def _is_run(name: str) -> bool:
    workdir = epath.Path(name)
    return storage.in_bucket(workdir) or (workdir / EXPERIMENT_FILE).exists()


def _base(name: str) -> Base:
    if _is_run(name):
        return Run.load(epath.Path(name)).base
    path = huggingface.resolve(name)
    model, variables = huggingface.from_huggingface(path)
    tokenizer = family_of(model.config).load_tokenizer(path)
    return Base(model.config, variables["params"], tokenizer)


def _experiment(encoder: str, architecture: Any, method: Any, tasks: Sequence[Task]) -> Experiment:
    config = config_lib.default()
    config.encoder, config.method = encoder, serialize.dumps(method)
    config.tasks = tuple(task.name for task in tasks)
    return Experiment(config, tuple(tasks), architecture)


def _from_checkpoint(place: str, found: Checkpoint, base: str, tasks: Sequence[Task] | None) -> Run:
    tasks = found.tasks if tasks is None else _checked(place, found, tasks)
    if not found.has_heads:
        tasks = [dataclasses.replace(task, has_head=False) for task in tasks]
    num_outputs = [task.num_outputs for task in tasks]
    adapters = task_axis.take(found.variables["adapters"], num_outputs, range(len(tasks)))
    architecture = found.model.config
    experiment = _experiment(base or place, architecture, found.model.method, tasks)
    experiment.config.data.max_length = architecture.max_length
    tokenizer = _tokenizer(found.directory, base)
    return Run.of(experiment, tokenizer, {**found.variables, "adapters": adapters})


def _checked(place: str, found: Checkpoint, tasks: Sequence[Task]) -> Sequence[Task]:
    """The user's tasks, if they fit the heads of a checkpoint."""
    mine, theirs = [task.num_outputs for task in tasks], list(found.model.num_outputs)
    if len(mine) != len(theirs) or (found.has_heads and mine != theirs):
        raise UserError(
            f"{place} has heads with {', '.join(map(str, theirs))} outputs, and the given tasks"
            f" have {', '.join(map(str, mine)) or 'none'}; give one task for each head, with its"
            " labels."
        )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"the given tasks {', '.join(names)} repeat a name; rename one.")
    return tasks


def _tokenizer(directory: Path, base: str) -> Tokenizer:
    """The tokenizer in a directory, or else that of the base."""
    if has_tokenizer(directory):
        return load_tokenizer(directory)
    if not base:
        raise UserError(
            f"{directory} has no tokenizer (tokenizer.json or vocab.txt); put it there, or name the"
            " encoder that has it with base=."
        )
    if _is_run(base):
        workdir = epath.Path(base)
        return saved_tokenizer(load_experiment(workdir), workdir)
    return load_tokenizer(huggingface.resolve(base))


def _check_has_no_decoder(path: Path) -> None:
    if (path / "config.json").is_file() and is_bart(path):
        raise UserError(
            f"{path} holds an encoder-decoder, which has no classifier; load a task file with this"
            " as its base=, or read it with from_huggingface or from_unified_view of"
            " pals_jax.convert."
        )


def _format_of(path: epath.Path) -> str:
    """The one format of what a place holds."""
    if storage.in_bucket(path):
        return "run"  # the only one that may be in a bucket; its reader says what is missing
    try:
        found = [name for name, holds in _HOLDS.items() if holds(Path(path))]
    except OSError as error:  # such as a name that is too long, or a directory of somebody else
        raise UserError(f"cannot look into {path}: {reason(error)}.") from error
    _check_has_no_decoder(Path(path))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{path} holds several formats, {' and '.join(found)}; name one with format=."
        )
    if not path.exists():
        raise UserError(
            f"there is no {path}; name a place that exists or, for a classifier on the Hugging Face"
            ' hub, add format="huggingface".'
        )
    if huggingface.has_model_files(Path(path)):
        raise UserError(
            f"{path} holds an encoder without a classifier; load a task file or an adapter, with"
            " this as its base=."
        )
    raise UserError(
        f"{path} holds nothing to load; it needs the files of one of {', '.join(FORMATS)}."
    )


_HOLDS: Mapping[str, Callable[[Path], bool]] = {
    "run": lambda path: (path / EXPERIMENT_FILE).is_file(),
    "task": lambda path: path.is_file() and task_file.is_task_file(path),
    **{name: foreign_format.holds for name, foreign_format in FOREIGN.items()},
}
FORMATS = tuple(_HOLDS)
