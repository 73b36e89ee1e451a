"""What runs cost, and which decision is the cheapest."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from rich.table import Table

from pals_jax.experiment.config import override
from pals_jax.experiment.experiment import Experiment
from pals_jax.runtime.console import print_table, say
from pals_jax.training.plan import flops
from pals_jax.training.train import train
from results.claims import BASELINES, Claim
from results.jobs import Campaign, Job


class Costs:
    """The cost of a campaign's jobs, counted when it is first asked for."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self._costs: dict[tuple[str, tuple[int, ...]], float] = {}
        self._counted: dict[str, dict[str, float]] = {}

    def __call__(self, job: Job) -> float:
        """FLOPs of the matrix products of a job: training and all evaluations of each run."""
        key = job.name, job.seeds
        if key not in self._costs:
            self._costs[key] = self._cost(job)
        return self._costs[key]

    def _cost(self, job: Job) -> float:
        experiment = Experiment.from_config(self.campaign.config(job, job.seeds[0]))
        config, room = experiment.config, experiment.room
        forward = flops.forward(experiment.model(), *room) / sum(room)
        dev = forward * sum(self._tokens(experiment, task)["dev"] for task in job.tasks)
        if job.arm.kind in BASELINES:
            whole = sum(self._tokens(experiment, task)["train"] for task in job.tasks)
            return forward * whole + dev
        turns = len(job.tasks) if job.arm.kind == "added" else 1
        steps = turns * experiment.steps * config.batch_size * self.training_flops(job)
        variants = sum(job.arm.name == arm.of for arm in self.campaign.claims.arms.values())
        if job.arm.kind == "spans":
            depth = experiment.encoder().config.num_hidden_layers
            variants += depth * (depth + 1) // 2
        # One evaluation after each epoch, and those without some adapters.
        return len(job.seeds) * (steps + (config.epochs + variants) * dev)

    def training_flops(self, job: Job) -> float:
        """FLOPs of the matrix products of one example's training."""
        experiment = Experiment.from_config(self.campaign.config(job, job.seeds[0]))
        room = experiment.room
        whole = flops.training(experiment.model(), experiment.config.trainable, *room)
        mean = np.mean([self._tokens(experiment, task)["mean"] for task in job.tasks])
        return float(whole / sum(room) * mean)

    def _tokens(self, experiment: Experiment, name: str) -> dict[str, float]:
        """Tokens, of all texts, of a task's train and dev sets and of its mean training example."""
        if name not in self._counted:
            (task,) = (task for task in experiment.tasks if task.name == name)
            tokenizer = experiment.load_tokenizer()
            train = experiment.read(task, "train", tokenizer)
            held_out = experiment.read_eval(task, tokenizer).values()
            self._counted[name] = {
                "train": float(train.sizes.sum()),
                "dev": float(sum(split.sizes.sum() for split in held_out)),
                "mean": float(train.sizes.sum() / len(train)),
            }
        return self._counted[name]


def cheapest_first(costs: Costs, chosen: Sequence[Claim]) -> Iterator[tuple[Claim, list[Job]]]:
    """The claims that still need runs, the one that needs the least first, with their jobs.

    First come the arms that decide claims, of all claims; then those that are only shown. A job
    that several claims need counts for the first of them.
    """
    planned: set[tuple[str, int]] = set()

    def needed(claim: Claim, arms: Sequence[str]) -> list[Job]:
        jobs = costs.campaign.missing(claim, arms)
        return [job for job in jobs if not planned.issuperset(_runs(job))]

    for arms_of in (lambda claim: claim.compared, lambda claim: claim.shown):
        waiting = {claim.name: (claim, arms_of(claim)) for claim in chosen}
        while waiting:
            claim, arms = min(waiting.values(), key=lambda each: sum(map(costs, needed(*each))))
            del waiting[claim.name]
            if jobs := sorted(needed(claim, arms), key=costs):
                planned.update(run for job in jobs for run in _runs(job))
                yield claim, jobs


def _runs(job: Job) -> list[tuple[str, int]]:
    return [(job.name, seed) for seed in job.seeds]


def measured_speed(costs: Costs, job: Job) -> float:
    """FLOP/s of this device in training: the last steps of the first 40 of one of a job's runs."""
    config = override(
        costs.campaign.config(job, job.seeds[0]), {"epochs": 1, "steps_per_epoch": 40}
    )
    with tempfile.TemporaryDirectory() as scratch:
        train(config, epath.Path(scratch))
        lines = (Path(scratch) / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("examples_per_second") for line in lines]
    return costs.training_flops(job) * [rate for rate in rates if rate][-1]


def plan(costs: Costs, chosen: Sequence[Claim]) -> None:
    """Prints what is missing and how long it takes, at the measured speed of this device."""
    listed = [(claim, jobs) for claim, jobs in cheapest_first(costs, chosen)]
    trained = [job for _, jobs in listed for job in jobs if job.arm.kind not in BASELINES]
    if not trained:
        say("nothing is missing that has to be trained")
        return
    speed = measured_speed(costs, min(trained, key=costs))
    table = Table(title=f"what is missing, at {speed / 1e9:.0f} GFLOP/s", title_justify="left")
    for column in ("claim", "jobs", "runs", "hours"):
        table.add_column(column, justify="right" if column != "claim" else "left")
    for claim, jobs in listed:
        hours = sum(map(costs, jobs)) / speed / 3600
        runs = sum(len(job.seeds) for job in jobs)
        table.add_row(claim.name, str(len(jobs)), str(runs), f"{hours:.1f}")
    print_table(table)
