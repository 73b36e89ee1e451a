"""Export of a run's tasks to other formats or task files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pals_jax import convert
from pals_jax.convert import huggingface, task_file
from pals_jax.inference.run import Run
from pals_jax.models.architectures import Model
from pals_jax.models.merge import flat_prefixes
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError


def export(run: Run, name: str, to: str, out: Path) -> None:
    """Writes one task of a run in the format `to`, a key of `FORMATS`.

    Raises:
        UserError: if there is no such task or format, `out` exists, or the format cannot hold the
            run's method.
    """
    task = run.task(name)
    if to not in FORMATS:
        raise UserError(f"there is no format {to!r}; formats are {', '.join(FORMATS)}.")
    if out.exists():
        raise UserError(f"{out} exists; choose another place to write to.")
    FORMATS[to](run, run.experiment.tasks.index(task), out)
    say(f"wrote {name} to {out}")


def _task_file(run: Run, task: int, out: Path) -> None:
    experiment = run.experiment
    method, adapters = flat_prefixes(experiment.model().method, run.variables["adapters"])
    task_file.save(
        out,
        run.base,
        experiment.tasks[task],
        method,
        experiment.family.max_lengths(experiment.config.data),
        adapters,
        task,
    )


def _huggingface(run: Run, task: int, out: Path) -> None:
    """Writes the task with LoRA and the like merged; prints how much merging changes logits."""
    model, labels = run.experiment.model(), run.experiment.tasks[task].labels
    written: tuple[Any, Any]
    if isinstance(model, Seq2SeqModel):
        base = huggingface.resolve(run.experiment.config.encoder)
        written = convert.to_conditional_generation(model, run.variables, task, base, out)
    else:
        names = labels or None
        written = convert.to_sequence_classification(model, run.variables, task, out, names)
    run.tokenizer.save_pretrained(out)
    change = largest_logit_change(model, run.variables, task, *written)
    say(f"merging changes no logit by more than {change:.1e} (on 8 random texts)")


def _adapterhub(run: Run, task: int, out: Path) -> None:
    convert.to_adapterhub(run.experiment.model(), run.variables, task, out)


def _peft(run: Run, task: int, out: Path) -> None:
    convert.to_peft(run.experiment.model(), run.variables, task, out)


FORMATS: Mapping[str, Callable[[Run, int, Path], None]] = {
    "task": _task_file,
    "huggingface": _huggingface,
    "adapterhub": _adapterhub,
    "peft": _peft,
}


def largest_logit_change(model: Model, variables: Any, task: int, alone: Model, own: Any) -> float:
    """The largest difference between a task's logits in a model and in its merged model.

    Args:
        model: the model of T tasks.
        variables: the variables of `model`.
        task: the index of the task.
        alone: the model of this task alone (T = 1), as `merged` returns it.
        own: the variables of `alone`.

    Returns:
        The largest difference on 8 random token rows.
    """
    length = min(32, model.config.max_length)
    first = 0 if isinstance(model, Seq2SeqModel) else model.config.pad_token_id + 1
    ids = np.random.default_rng(0).integers(
        first, model.config.vocab_size, (8, length), dtype=np.int32
    )
    ones = np.ones_like(ids)
    if isinstance(model, Seq2SeqModel):
        arrays: tuple[np.ndarray, ...] = (ids, ones, ids, ones)
    else:
        arrays = ids, np.zeros_like(ids), ones
    before = jax.jit(model.apply)(variables, *arrays, task)
    after = jax.jit(alone.apply)(own, *arrays, 0)
    return float(jnp.abs(after - before[..., : after.shape[-1]]).max())
