"""Running what is missing: the cheapest decision first, resumable at any step."""

import contextlib
import dataclasses
import fcntl
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pals_jax.experiment.checkpoint import best_predictions
from pals_jax.experiment.config import encoder_is_frozen, override
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference import ablation
from pals_jax.inference.run import Run
from pals_jax.models import counts, task_axis
from pals_jax.models.merge import flat_method
from pals_jax.runtime import distributed, storage
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import Diverged, Preempted
from pals_jax.training.sweep import in_one_step, train_all
from pals_jax.training.train import train
from results import baselines, records
from results.claims import BASELINES, Arm, Claim
from results.costs import Costs, cheapest_first
from results.jobs import Campaign, Job
from results.records import ABLATION, EARLIER
from results.statistics import BLEU


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs the jobs of a campaign.

    Attributes:
        campaign: the claims, the device, the data and the records.
        workdirs: where unfinished runs live.
        end: when to stop, by `time.monotonic`.
    """

    campaign: Campaign
    workdirs: Path
    end: float = math.inf

    def run(self, job: Job) -> None:
        """Runs a job to its end and writes its records.

        Raises:
            Preempted: it was told to stop; run again, it goes on.
        """
        if job.arm.kind in BASELINES:
            self._run_baselines(job)
            return
        parent = epath.Path(self.workdirs / self.campaign.device / job.name)
        configs = {str(seed): self.campaign.config(job, seed) for seed in job.seeds}
        added = job.arm.kind == "added"
        # On a CPU, the products of stacked runs take longer than those of one run after another.
        one_step = (
            self.campaign.device != "cpu"
            and encoder_is_frozen(configs[str(job.seeds[0])])
            and not added
        )
        for names in in_one_step(configs, parent) if one_step else [[name] for name in configs]:
            self.check_time()
            with _Stopwatch([Path(parent) / f"{name}.seconds" for name in names]) as watch:
                runs = _train(job, {name: configs[name] for name in names}, parent)
            for name in names:
                run = runs[name]
                change = _largest_change(configs[name], parent / name) if added and run else None
                self._write_trained(job, parent / name, run, configs[name], watch.seconds, change)
                shutil.rmtree(parent / name)
                (Path(parent) / f"{name}.seconds").unlink()

    @contextlib.contextmanager
    def held(self, job: Job) -> Iterator[bool]:
        """Whether this process has the job to itself; inside, no other process begins it."""
        folder = self.workdirs / self.campaign.device / job.lock
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(opened)  # and, with it, the lock

    def check_time(self) -> None:
        distributed.stop_between_runs()
        if time.monotonic() > self.end:
            raise Preempted("the time is up; run it again to go on.")

    def _write_trained(
        self,
        job: Job,
        workdir: epath.Path,
        run: Run | None,
        config: ConfigDict,
        seconds: float,
        change: float | None,
    ) -> None:
        """The record of a run, and of each arm that is this one without some adapters."""
        experiment = Experiment.from_config(config)
        for arm in self.campaign.claims.arms.values():
            if job.arm.name in (arm.name, arm.of):
                active = None
                if arm.layers:
                    depth = np.arange(experiment.encoder().config.num_hidden_layers)
                    active = ~np.isin(depth, arm.layers)
                answers = None if run is None else _answers(arm, run, workdir, active)
                done = dataclasses.replace(job, arm=arm)
                cost = seconds if arm.name == job.arm.name else 0.0
                noticed: dict[str, Any] = {} if change is None else {EARLIER: change}
                if run is not None and arm.kind == "spans":
                    noticed = {ABLATION: ablation.to_json(ablation.ablate(run))}
                self._write(done, config.seed, experiment, answers, cost, noticed)

    def _run_baselines(self, job: Job) -> None:
        """All baselines of a task and encoder, because they share its vectors."""
        began = time.monotonic()
        experiment = Experiment.from_config(self.campaign.config(job, 0))
        found = baselines.answers(experiment)
        seconds = (time.monotonic() - began) / len(found)
        for arm in self.campaign.claims.arms.values():
            same = (arm.config, arm.overrides) == (job.arm.config, job.arm.overrides)
            if arm.kind in found and same:
                done = dataclasses.replace(job, arm=arm)
                self._write(done, 0, experiment, found[arm.kind], seconds)

    def _write(
        self,
        job: Job,
        seed: int,
        experiment: Experiment,
        answers: records.Answers | None,
        seconds: float,
        noticed: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._write_dev(experiment)
        model = experiment.model()
        counted = counts.count(model.clone(method=flat_method(model.method)))
        trains_encoder = not encoder_is_frozen(experiment.config)
        turns = len(job.tasks) if job.arm.kind == "added" else 1
        content: dict[str, Any] = {
            "arm": job.arm.name,
            "tasks": job.tasks,
            "seed": seed,
            "settings": self.campaign.claims.settings(self.campaign.device, job.arm),
            "steps": 0 if job.arm.kind in BASELINES else turns * experiment.steps,
            "seconds": round(seconds, 1),
            **noticed,
            "parameters": {
                "encoder": counted.encoder,
                "per_task": 0 if job.arm.kind in BASELINES else counted.per_task,
                "encoder_is_trained": trains_encoder and job.arm.kind not in BASELINES,
            },
            **records.provenance(),
            "answers": None if answers is None else records.encode_all(answers),
        }
        records.write(self.campaign.record(job.arm.name, job.tasks, seed), content)

    def _write_dev(self, experiment: Experiment) -> None:
        """The right answers of the tasks' dev sets, unless they are there."""
        for task in experiment.tasks:
            path = records.dev_file(task.name, self.campaign.pages)
            if not path.exists():
                texts = task.output == "text"
                examples = experiment.eval_examples(task)
                targets = {
                    split: np.array(x.target_texts if texts else x.targets)
                    for split, x in examples.items()
                }
                records.write(
                    path,
                    {
                        "task": task.name,
                        "metric": BLEU if texts else task.metrics[0],
                        "answers": records.encode_all({task.name: targets})[task.name],
                    },
                )


def _answers(arm: Arm, run: Run, workdir: epath.Path, active: np.ndarray | None) -> records.Answers:
    """What a run answers on the dev sets, with the adapters of the `active` layers."""
    tasks = run.experiment.tasks
    if tasks[0].output == "text":
        return baselines.texts(run)
    if arm.kind not in ("without", "added"):
        return best_predictions(workdir)  # of training, which evaluated the same variables
    splits = {task.name: run.experiment.read_eval(task, run.tokenizer) for task in tasks}
    return run.evaluator.predict(run.variables, splits, active)


def _train(job: Job, configs: dict[str, ConfigDict], parent: epath.Path) -> dict[str, Run | None]:
    """Trains the runs of these configurations, by name; None where one diverged."""
    if job.arm.kind == "added":
        return {name: _add_tasks(config, parent / name) for name, config in configs.items()}
    found = train_all(configs, parent)
    return {n: Run.load(parent / n) if found[n] is not None else None for n in configs}


def _add_tasks(config: ConfigDict, workdir: epath.Path) -> Run | None:
    """Trains the tasks of a configuration one after another, each added to the run before."""
    base = None
    for task in config.tasks:
        try:
            train(override(config, {"tasks": (task,)}), workdir / task, base)
        except Diverged as error:
            say(str(error))
            return None
        base = workdir / task
    return Run.load(base)


def _largest_change(config: ConfigDict, workdir: epath.Path) -> float:
    """The largest change of a task's parameters while later tasks were added; 0 if none moved."""

    def rows(run: Run, task: int) -> Any:
        return task_axis.take(
            run.variables["adapters"], run.experiment.model().num_outputs, (task,)
        )

    last, largest = Run.load(workdir / config.tasks[-1]), 0.0
    for task, name in enumerate(config.tasks):
        first = Run.load(workdir / name)
        changes = jax.tree.map(
            lambda x, y: jnp.abs(x - y).max(), rows(first, task), rows(last, task)
        )
        largest = max(largest, *map(float, jax.tree.leaves(changes)))
    return largest


class _Stopwatch:
    """Adds each run's share of the time inside to its file, so that it counts over all starts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.seconds = paths, 0.0  # of one run

    def __enter__(self) -> "_Stopwatch":
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        share = (time.monotonic() - self.began) / len(self.paths)
        for path in self.paths:
            before = float(path.read_text()) if path.exists() else 0.0
            self.seconds = before + share
            storage.write_text(epath.Path(path), str(self.seconds))


def run(runner: Runner, chosen: Sequence[Claim], hours: float) -> None:
    """Runs what is missing for the claims, until the time is up.

    Raises:
        Preempted: the time is up, or it was told to stop; run again, it goes on where it was.
    """
    timer = None
    if math.isfinite(hours):
        runner = dataclasses.replace(runner, end=time.monotonic() + 3600 * hours)
        # In the middle of a run, as a preempted machine is told.
        timer = threading.Timer(3600 * hours, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    commit = records.provenance()["commit"]  # now: the checkout may change while this process runs
    if commit.endswith("+"):
        say("warning: the code has changes that are not committed; records will say so with a +.")
    elsewhere = 0
    try:
        for claim, jobs in cheapest_first(Costs(runner.campaign), chosen):
            say(f"{claim.name} needs {len(jobs)} jobs: {claim.sentence}")
            for number, job in enumerate(jobs, 1):
                runner.check_time()
                where = f"{claim.name}, job {number} of {len(jobs)}: {job.name}"
                with runner.held(job) as free:
                    if not free:
                        say(f"{where} is being run by another process")
                        elsewhere += 1
                    # Another process, or another baseline, may have brought it along.
                    elif needed := runner.campaign.still_missing(claim, job):
                        say(f"{where}, seeds {', '.join(map(str, needed.seeds))}")
                        runner.run(needed)
        if elsewhere:
            say(f"{elsewhere} jobs were left to other processes; run it again for what is missing")
    finally:
        if timer is not None:
            timer.cancel()
