"""What has to be run: the jobs that claims still need, and the configuration of each run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pals_jax.experiment.config import load, override
from pals_jax.runtime.errors import UserError
from results import records
from results.claims import BASELINES, Arm, Claim, Claims

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = ("glue", "extra_tasks", "seq2seq/en_ro", "models/opus-mt-en-fr", "models/gte-small")


def check_data(data: Path) -> None:
    """Refuses a directory in which something is missing that the runs of all claims read.

    Raises:
        UserError: a folder is missing.
    """
    for folder in DATA:
        if not (data / folder).is_dir():
            raise UserError(
                f"there is no folder {folder} in {data}; results/config.py and"
                " results/translation.py say what must be there."
            )


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

    @property
    def lock(self) -> str:
        """What no other process may run meanwhile: this job, or all baselines of its tasks."""
        arm = "baselines" if self.arm.kind in BASELINES else self.arm.name
        return f"locks/{arm}/{'+'.join(self.tasks)}"


@dataclasses.dataclass(frozen=True)
class Campaign:
    """The claims on one device's data and records.

    Attributes:
        claims: the claims file.
        device: "cpu" or "gpu"; its settings are in the claims file.
        data: the directory that results/config.py and results/translation.py read.
        pages: docs/results.
    """

    claims: Claims
    device: str
    data: Path
    pages: Path = records.PAGES

    def missing(self, claim: Claim, arms: Sequence[str]) -> list[Job]:
        """The jobs that these arms of a claim still need, one for each that is trained and task.

        Raises:
            UserError: a record is damaged, or of a run with other settings.
        """
        found: dict[tuple[str, tuple[str, ...]], set[int]] = {}
        for name in arms:
            arm = self.claims.arms[name]
            for tasks in claim.runs_of(arm):
                for seed in claim.seeds_of(arm):
                    path = self.record(name, tasks, seed)
                    if path.exists():
                        records.check(
                            path, records.read(path), self.claims.settings(self.device, arm)
                        )
                    else:
                        found.setdefault((arm.of or name, tasks), set()).add(seed)
        return [
            Job(self.claims.arms[name], tasks, tuple(sorted(seeds)))
            for (name, tasks), seeds in found.items()
        ]

    def still_missing(self, claim: Claim, job: Job) -> Job | None:
        """What a claim needs now of a job that it needed before."""
        by_name = {each.name: each for each in self.missing(claim, claim.arms)}
        return by_name.get(job.name)

    def record(self, arm: str, tasks: tuple[str, ...], seed: int) -> Path:
        """Where the record of a run is."""
        return records.run_file(self.device, arm, tasks, seed, self.pages)

    def config(self, job: Job, seed: int) -> ConfigDict:
        """The configuration of one run."""
        file = REPOSITORY / (job.arm.config or self.claims.config)
        config = load([f"--config={file}:{self.data}"])
        settings = self.claims.settings(self.device, job.arm)
        given = {key: self._value(value) for key, value in settings.items()}
        return override(config, {**given, "tasks": job.tasks, "seed": seed})

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{data}", str(self.data))
        return tuple(value) if isinstance(value, list) else value
