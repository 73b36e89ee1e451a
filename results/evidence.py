"""What the records of the runs say about a claim."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from results import records
from results.claims import BASELINES, Arm, Claim, Claims
from results.statistics import BLEU, Difference, Side, difference

_MISSING = "runs are missing"


class Evidence:
    """The records of the runs of one device, read as they are asked for."""

    def __init__(self, claims: Claims, pages: Path, device: str) -> None:
        self.claims, self.pages, self.device = claims, pages, device
        self._read: dict[Path, dict[str, Any]] = {}

    def record(self, path: Path) -> dict[str, Any] | None:
        """A record, or None if there is none."""
        if not path.exists():
            return None
        if path not in self._read:
            self._read[path] = records.read(path)
        return self._read[path]

    def runs(self, claim: Claim, arm: Arm, task: str) -> list[dict[str, Any]]:
        """The records of an arm's runs of a task, one for each seed that has one."""
        (tasks,) = (tasks for tasks in claim.runs_of(arm) if task in tasks)
        paths = [
            records.run_file(self.device, arm.name, tasks, seed, self.pages)
            for seed in claim.seeds_of(arm)
        ]
        found = [(path, record) for path in paths if (record := self.record(path)) is not None]
        for path, record in found:
            records.check(path, record, self.claims.settings(self.device, arm))
        return [record for _, record in found]

    def side(self, claim: Claim, arm: Arm, task: str) -> Side | None:
        """What an arm answers on a task with all its seeds, or None if a run is missing."""
        runs, dev = self.runs(claim, arm, task), self.record(records.dev_file(task, self.pages))
        complete = len(runs) == len(claim.seeds_of(arm))
        if dev is None or not complete or any(run["answers"] is None for run in runs):
            return None
        truth = records.decode_all({task: dev["answers"]})[task]
        answers = [records.decode_all(run["answers"])[task] for run in runs]
        rows = [np.concatenate([each[split] for split in truth]) for each in answers]
        of_texts = dev["metric"] == BLEU
        make = Side.of_texts if of_texts else functools.partial(Side, metric=dev["metric"])
        return make(np.stack(rows), np.concatenate([*truth.values()]))

    def compare(self, claim: Claim, pair: tuple[str, str]) -> Difference | None:
        """The difference of a pair over all tasks of a claim, or None if a run is missing."""
        return self.on(claim, pair, claim.tasks)

    def on(self, claim: Claim, pair: tuple[str, str], tasks: tuple[str, ...]) -> Difference | None:
        """The same over some of the tasks."""
        arms = [self.claims.arms[name] for name in pair]
        ones, others = ([self.side(claim, arm, task) for task in tasks] for arm in arms)
        if any(side is None for side in (*ones, *others)):
            return None
        together = any(arm.together for arm in arms)
        return difference(ones, others, len(claim.seeds), together)  # type: ignore[arg-type]

    def lacks(self, claim: Claim, pair: tuple[str, str]) -> str:
        """Why `compare` has no answer."""
        arms = [self.claims.arms[name] for name in pair]
        runs = [run for arm in arms for task in claim.tasks for run in self.runs(claim, arm, task)]
        return "a run diverged" if any(run["answers"] is None for run in runs) else _MISSING

    def heat_map(self, claim: Claim) -> np.ndarray | None:
        """`ablate`'s changes, the mean over the claim's tasks; None without all the runs."""
        arm = next((a for n in claim.arms if (a := self.claims.arms[n]).kind == "spans"), None)
        if arm is None:
            return None
        runs = [run for task in claim.tasks for run in self.runs(claim, arm, task)]
        if len(runs) < len(claim.tasks) or any(records.ABLATION not in run for run in runs):
            return None
        changes = [change for run in runs for change in run[records.ABLATION].values()]
        return np.mean(np.array(changes, np.float64), axis=0)

    def is_complete(self, claim: Claim) -> bool:
        """Whether every pair can be compared."""
        return all(
            self.side(claim, self.claims.arms[name], task) is not None
            for pair in claim.pairs
            for name in pair
            for task in claim.tasks
        )

    def all_runs(self, claim: Claim) -> list[dict[str, Any]]:
        """Every record of a claim's arms, each once."""
        found = {}
        for arm in (self.claims.arms[name] for name in claim.arms):
            for task in claim.tasks:
                for run in self.runs(claim, arm, task):
                    found[arm.name, tuple(run["tasks"]), run["seed"]] = run
        return list(found.values())

    def moved(self, claim: Claim) -> float | None:
        """The largest change of earlier tasks' parameters; None if no tasks were added."""
        changes = [run[records.EARLIER] for run in self.all_runs(claim) if records.EARLIER in run]
        return max(changes, default=None)

    def stored(self, claim: Claim, arm: Arm) -> float | None:
        """The parameters of all tasks, encoders in and heads out, over those of one encoder."""
        tasks = claim.trained_with or claim.tasks
        if (share := self.stored_share(claim, arm)) is None:
            return None
        return 1.0 + len(tasks) * (share - 1.0) if arm.together else len(tasks) * share

    def stored_share(self, claim: Claim, arm: Arm) -> float | None:
        """The parameters that are stored of a task, head out, over the encoder's.

        Those of a trained encoder are among them.
        """
        for task in claim.tasks if arm.kind not in ("without", *BASELINES) else ():
            for run in self.runs(claim, arm, task):
                counted = run["parameters"]
                whole = 1.0 if counted["encoder_is_trained"] else 0.0
                return float(whole + counted["per_task"] / counted["encoder"])
        return None
