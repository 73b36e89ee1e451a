"""Running what is missing: the cheapest decision first, resumable at any step."""

import dataclasses
import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.table import Table

from pals_jax.convert import huggingface
from pals_jax.data.tokenize import load_tokenizer
from pals_jax.experiment.config import encoder_is_frozen, load, override
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.evaluator import decide
from pals_jax.inference.run import Run
from pals_jax.models import counts
from pals_jax.runtime import storage
from pals_jax.runtime.console import print_table, say
from pals_jax.runtime.errors import Preempted
from pals_jax.training.plan import flops
from pals_jax.training.sweep import in_one_step, train_all
from pals_jax.training.train import train
from results import baselines, records
from results.claims import BASELINES, Arm, Claim, Claims

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
    """An arm on one task, or on all tasks of a claim together, with the seeds that are missing."""

    arm: Arm
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the log calls it, and the folder of its workdirs."""
        return f"{self.arm.name}/{'+'.join(self.tasks)}"


def jobs_of(claims: Claims, claim: Claim, device: str, pages: Path) -> list[Job]:
    """The jobs that a claim still needs on a device, one for each arm that is trained and task.

    Raises:
        UserError: a record is damaged, or of a run with other settings.
    """
    missing: dict[tuple[str, tuple[str, ...]], set[int]] = {}
    for name in claim.arms:
        arm = claims.arms[name]
        seeds = (0,) if arm.kind in BASELINES else claim.seeds
        for tasks in [claim.tasks] if arm.together else [(task,) for task in claim.tasks]:
            for seed in seeds:
                path = records.run_file(device, name, tasks, seed, pages)
                if path.exists():
                    records.check(path, records.read(path), claims.settings(device, arm))
                else:
                    missing.setdefault((arm.of or name, tasks), set()).add(seed)
    return [
        Job(claims.arms[name], tasks, tuple(sorted(seeds)))
        for (name, tasks), seeds in missing.items()
    ]


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs jobs on one device.

    Attributes:
        claims: the claims file.
        device: "cpu" or "gpu"; its settings are in the claims file.
        data: the directory that results/config.py reads.
        workdirs: where unfinished runs live.
        pages: docs/results.
        end: when to stop, by `time.monotonic`.
    """

    claims: Claims
    device: str
    data: Path
    workdirs: Path
    pages: Path = records.PAGES
    end: float = math.inf
    _costs: dict[tuple[str, tuple[int, ...]], float] = dataclasses.field(default_factory=dict)
    _counted: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def config(self, job: Job, seed: int) -> ConfigDict:
        """The configuration of one run."""
        config = load([f"--config={REPOSITORY / self.claims.config}:{self.data}"])
        settings = self.claims.settings(self.device, job.arm)
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return override(config, {**tuples, "tasks": job.tasks, "seed": seed})

    def cost(self, job: Job) -> float:
        """FLOPs of the matrix products of a job: training and all evaluations of each run."""
        key = job.name, job.seeds
        if key not in self._costs:
            self._costs[key] = self._cost(job)
        return self._costs[key]

    def _cost(self, job: Job) -> float:
        experiment = Experiment.from_config(self.config(job, job.seeds[0]))
        config, length = experiment.config, experiment.config.data.max_length
        forward = flops.forward(experiment.model(), length) / length
        dev = forward * sum(self._tokens(experiment, task)["dev"] for task in job.tasks)
        if job.arm.kind in BASELINES:
            whole = sum(self._tokens(experiment, task)["train"] for task in job.tasks)
            return (forward * whole + dev) / len(BASELINES)
        steps = experiment.steps * config.batch_size * self.training_flops(job)
        variants = sum(job.arm.name in (arm.name, arm.of) for arm in self.claims.arms.values())
        # One after each epoch, one of the best checkpoint, and those of the records.
        return len(job.seeds) * (steps + (config.epochs + 1 + variants) * dev)

    def training_flops(self, job: Job) -> float:
        """FLOPs of the matrix products of one example's training."""
        experiment = Experiment.from_config(self.config(job, job.seeds[0]))
        length = experiment.config.data.max_length
        whole = flops.training(experiment.model(), experiment.config.trainable, length)
        mean = np.mean([self._tokens(experiment, task)["mean"] for task in job.tasks])
        return float(whole / length * mean)

    def _tokens(self, experiment: Experiment, name: str) -> dict[str, float]:
        """Tokens of a task's train and dev sets, and of its mean training example."""
        if name not in self._counted:
            (task,) = (task for task in experiment.tasks if task.name == name)
            tokenizer = load_tokenizer(huggingface.resolve(experiment.config.encoder))
            train = experiment.read(task, "train", tokenizer)
            held_out = experiment.read_eval(task, tokenizer).values()
            self._counted[name] = {
                "train": float(train.offsets[-1]),
                "dev": float(sum(split.offsets[-1] for split in held_out)),
                "mean": float(train.lengths.mean()),
            }
        return self._counted[name]

    def run(self, job: Job) -> None:
        """Runs a job to its end and writes its records.

        Raises:
            Preempted: it was told to stop; run again, it goes on.
        """
        if job.arm.kind in BASELINES:
            self._run_baselines(job)
            return
        parent = epath.Path(self.workdirs / self.device / job.name)
        configs = {str(seed): self.config(job, seed) for seed in job.seeds}
        frozen = encoder_is_frozen(configs[str(job.seeds[0])])
        for names in in_one_step(configs, parent) if frozen else [[name] for name in configs]:
            self.check_time()
            with _Stopwatch([Path(parent) / f"{name}.seconds" for name in names]) as watch:
                found = train_all({name: configs[name] for name in names}, parent)
            for name in names:
                self._write_trained(job, configs[name], parent / name, found[name], watch.seconds)
                shutil.rmtree(parent / name)
                (Path(parent) / f"{name}.seconds").unlink()

    def check_time(self) -> None:
        if time.monotonic() > self.end:
            raise Preempted("the time is up; run it again to go on.")

    def _write_trained(
        self, job: Job, config: ConfigDict, workdir: epath.Path, found: Any, seconds: float
    ) -> None:
        """The record of a run, and of each arm that is this one without some adapters."""
        experiment = Experiment.from_config(config)
        run = None if found is None else Run.load(workdir)
        for arm in self.claims.arms.values():
            if job.arm.name in (arm.name, arm.of):
                active = None
                if arm.layers:
                    depth = np.arange(experiment.encoder().config.num_hidden_layers)
                    active = ~np.isin(depth, arm.layers)
                answers = None if run is None else _answers(run, active)
                done = dataclasses.replace(job, arm=arm)
                cost = seconds if arm.name == job.arm.name else 0.0
                self._write(done, config.seed, experiment, answers, cost)

    def _run_baselines(self, job: Job) -> None:
        """All baselines of a task, because they share the encoder's vectors."""
        began = time.monotonic()
        experiment = Experiment.from_config(self.config(job, 0))
        found = baselines.answers(experiment)
        seconds = (time.monotonic() - began) / len(found)
        for arm in self.claims.arms.values():
            if arm.kind in found:
                done = dataclasses.replace(job, arm=arm)
                self._write(done, 0, experiment, found[arm.kind], seconds)

    def _write(
        self,
        job: Job,
        seed: int,
        experiment: Experiment,
        answers: records.Answers | None,
        seconds: float,
    ) -> None:
        self._write_dev(experiment)
        counted = counts.count(experiment.model())
        trains_encoder = not encoder_is_frozen(experiment.config)
        content: dict[str, Any] = {
            "arm": job.arm.name,
            "tasks": job.tasks,
            "seed": seed,
            "settings": self.claims.settings(self.device, job.arm),
            "steps": 0 if job.arm.kind in BASELINES else experiment.steps,
            "seconds": round(seconds, 1),
            "parameters": {
                "encoder": counted.encoder,
                "per_task": 0 if job.arm.kind in BASELINES else counted.per_task,
                "encoder_is_trained": trains_encoder and job.arm.kind not in BASELINES,
            },
            **records.provenance(),
            "answers": None if answers is None else records.encode_all(answers),
        }
        records.write(
            records.run_file(self.device, job.arm.name, job.tasks, seed, self.pages), content
        )

    def _write_dev(self, experiment: Experiment) -> None:
        """The right answers of the tasks' dev sets, unless they are there."""
        for task in experiment.tasks:
            path = records.dev_file(task.name, self.pages)
            if not path.exists():
                tokenizer = load_tokenizer(huggingface.resolve(experiment.config.encoder))
                splits = experiment.read_eval(task, tokenizer)
                targets = {split: x.targets for split, x in splits.items()}
                records.write(
                    path,
                    {
                        "task": task.name,
                        "metric": task.metrics[0],
                        "answers": records.encode_all({task.name: targets})[task.name],
                    },
                )


def _answers(run: Run, active: np.ndarray | None) -> records.Answers:
    """What a run answers on the dev sets, with the adapters of the `active` layers."""
    found: records.Answers = {}
    for task in run.experiment.tasks:
        splits = run.experiment.read_eval(task, run.tokenizer)
        found[task.name] = {
            name: decide(task, run.evaluator.logits(run.variables, task, split, active))
            for name, split in splits.items()
        }
    return found


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


def cheapest_first(runner: Runner, chosen: Sequence[Claim]) -> Iterator[tuple[Claim, list[Job]]]:
    """The claims that still need runs, the one that needs the least first, with their jobs.

    A job that several claims need counts for the first of them.
    """
    planned: set[tuple[str, int]] = set()
    waiting = list(chosen)

    def needed(claim: Claim) -> list[Job]:
        jobs = jobs_of(runner.claims, claim, runner.device, runner.pages)
        return [job for job in jobs if not planned.issuperset(_runs(job))]

    while waiting:
        claim = min(waiting, key=lambda claim: sum(map(runner.cost, needed(claim))))
        waiting.remove(claim)
        if jobs := sorted(needed(claim), key=runner.cost):
            planned.update(run for job in jobs for run in _runs(job))
            yield claim, jobs


def _runs(job: Job) -> list[tuple[str, int]]:
    return [(job.name, seed) for seed in job.seeds]


def measured_speed(runner: Runner, job: Job) -> float:
    """FLOP/s of this device in training: the last steps of the first 40 of one of a job's runs."""
    config = override(runner.config(job, job.seeds[0]), {"epochs": 1, "steps_per_epoch": 40})
    with tempfile.TemporaryDirectory() as scratch:
        train(config, epath.Path(scratch))
        lines = (Path(scratch) / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("examples_per_second") for line in lines]
    return runner.training_flops(job) * [rate for rate in rates if rate][-1]


def plan(runner: Runner, chosen: Sequence[Claim]) -> None:
    """Prints what is missing and how long it takes, at the measured speed of this device."""
    listed = [(claim, jobs) for claim, jobs in cheapest_first(runner, chosen)]
    trained = [job for _, jobs in listed for job in jobs if job.arm.kind not in BASELINES]
    if not trained:
        say("nothing is missing that has to be trained")
        return
    speed = measured_speed(runner, min(trained, key=runner.cost))
    table = Table(title=f"what is missing, at {speed / 1e9:.0f} GFLOP/s", title_justify="left")
    for column in ("claim", "jobs", "runs", "hours"):
        table.add_column(column, justify="right" if column != "claim" else "left")
    for claim, jobs in listed:
        hours = sum(map(runner.cost, jobs)) / speed / 3600
        runs = sum(len(job.seeds) for job in jobs)
        table.add_row(claim.name, str(len(jobs)), str(runs), f"{hours:.1f}")
    print_table(table)


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
    try:
        for claim, jobs in cheapest_first(runner, chosen):
            say(f"{claim.name} needs {len(jobs)} jobs: {claim.sentence}")
            for number, job in enumerate(jobs, 1):
                runner.check_time()
                # Another baseline may have brought it along.
                if job in jobs_of(runner.claims, claim, runner.device, runner.pages):
                    say(f"{claim.name}, job {number} of {len(jobs)}: {job.name}, {job.seeds}")
                    runner.run(job)
    finally:
        if timer is not None:
            timer.cancel()
