"""Sweeps: one run for each entry of a configuration's `sweep`, and a table of their scores.

Runs on a frozen encoder that differ only in seed and learning rate are trained together, in one
step.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pals_jax.data import metrics
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.checkpoint import newest_step
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.evaluator import Results
from pals_jax.runtime import distributed, storage
from pals_jax.runtime.compile_cache import forget_compiled
from pals_jax.runtime.console import print_table, say
from pals_jax.runtime.errors import Diverged, UserError
from pals_jax.training.train import train
from pals_jax.training.vmapped_runs import can_be_vmapped, train_together

if TYPE_CHECKING:
    from rich.table import Table

SWEEP_FILE = "sweep.json"


def sweep(config: ConfigDict, workdir: epath.Path) -> list[dict[str, Any]]:
    """Trains the configuration with each of its overrides, in `workdir/NAME`.

    An interrupted sweep is resumed: finished runs are only evaluated again. Runs that diverge have
    no results and do not stop the others.

    Args:
        config: a configuration with `sweep`, a list of {dotted key: value}.
        workdir: the parent of the runs' directories and of sweep.json.

    Returns:
        The content of sweep.json, best run first. Each entry has: overrides, workdir, results,
        scores of the tasks (`pals_jax.data.metrics.score`) and score, their mean, or None if the
        run diverged.

    Raises:
        UserError: if the list is empty or has duplicates, or an entry is not a mapping of keys of
            the configuration.
    """
    for each in config.sweep:
        if not (isinstance(each, dict) and each and all(isinstance(key, str) for key in each)):
            raise UserError(
                f"configuration: sweep has {each!r}, which is not a {{key: value}} mapping; a sweep"
                " with one entry needs a trailing comma, ({'seed': 0},)."
            )
    overrides = {_name(each): dict(each) for each in config.sweep}
    runs = {name: config_lib.override(config, each) for name, each in overrides.items()}
    if not runs or len(runs) < len(config.sweep):
        raise UserError(
            "configuration: sweep is empty or names a run twice; give a list of overrides such as"
            " ({'seed': 0}, {'seed': 1})."
        )
    for one in runs.values():
        Experiment.from_config(one)  # reports errors before any run is trained
    rows: list[dict[str, Any]] = []
    for names in in_one_step(runs, workdir):
        distributed.stop_between_runs()
        of_all = train_all({name: runs[name] for name in names}, workdir)
        rows += [_row(runs[name], name, overrides[name], of_all[name]) for name in names]
        rows.sort(key=lambda row: -np.inf if row["score"] is None else row["score"], reverse=True)
        if distributed.is_main():
            storage.write_text(workdir / SWEEP_FILE, json.dumps(rows, indent=1))
    print_table(sweep_table(rows))
    return rows


def train_all(runs: dict[str, ConfigDict], workdir: epath.Path) -> dict[str, Results | None]:
    """Trains runs in one step; if one diverges, each alone.

    Args:
        runs: name -> configuration, any two of which `can_be_vmapped`.
        workdir: the parent of the runs' directories, which are called by their names.

    Returns:
        name -> the dev results of the best checkpoint, or None if the run diverged.
    """
    say(f"training {', '.join(runs)}")
    try:
        if len(runs) == 1:
            return {name: train(config, workdir / name) for name, config in runs.items()}
        of_all = train_together([*runs.values()], [workdir / name for name in runs])
        return dict(zip(runs, of_all, strict=True))
    except Diverged as error:
        say(str(error))
        if len(runs) == 1:
            return dict.fromkeys(runs)
    finally:
        forget_compiled()
    return {name: train_all({name: config}, workdir)[name] for name, config in runs.items()}


def in_one_step(runs: dict[str, ConfigDict], workdir: epath.Path) -> list[list[str]]:
    """Groups the runs' names; one step can train a group, all of which are at the same step."""
    groups: list[list[str]] = []
    for name, config in runs.items():
        for group in groups:
            same = newest_step(workdir / group[0]) == newest_step(workdir / name)
            if same and can_be_vmapped(runs[group[0]], config):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _row(
    config: ConfigDict, name: str, overrides: dict[str, Any], results: Results | None
) -> dict[str, Any]:
    """The entry of a run in sweep.json; a run without results has diverged."""
    row = {"overrides": overrides, "workdir": name, "results": results, "scores": {}, "score": None}
    if results is None:
        return row
    tasks = Experiment.from_config(config).tasks
    of_tasks = {task.name: task.metrics for task in tasks}
    scores = {name: metrics.score(names, results[name]) for name, names in of_tasks.items()}
    return row | {"scores": scores, "score": metrics.selection_score(of_tasks, results)}


def sweep_table(rows: list[dict[str, Any]]) -> "Table":
    """A table of the runs in the order of `rows`: overrides, each task's score x 100, the mean."""
    from rich.table import Table

    keys = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
    tasks = list(dict.fromkeys(task for row in rows for task in row["scores"]))
    columns = Table(title="sweep, dev scores (x 100)", title_justify="left")
    for key in keys:
        columns.add_column(key)
    for name in (*tasks, "mean"):
        columns.add_column(name, justify="right")
    for row in rows:
        given = (str(row["overrides"].get(key, "")) for key in keys)
        scores = (row["scores"].get(task) for task in tasks)
        cells = ["" if x is None else f"{100 * x:.1f}" for x in scores]
        mean = "diverged" if row["score"] is None else f"{100 * row['score']:.1f}"
        columns.add_row(*given, *cells, mean)
    return columns


def _name(overrides: dict[str, Any]) -> str:
    """The name of a run's directory, made from its overrides."""
    plain = ",".join(f"{key.rsplit('.')[-1]}={value}" for key, value in overrides.items())
    return "".join(c if c.isalnum() or c in "=,.-+()" else "_" for c in plain)
