"""Runs the scripts of launch/ against a stand-in for Google Cloud (fake_gcloud.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Self

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"
TPU = ("--name=pals", "--project=my-project", "--zone=europe-west4-a")
ENDS = "--project=my-project --zone=europe-west4-a --quiet"
TRAIN = ("--", "train", "--config=configs/demo.py", "--workdir=/mnt/run")

# What the TPU's pip and uv do: the environment gets a trainer that the test wrote.
PIP = """#!/usr/bin/env bash
mkdir -p ~/.local/bin && cp "$BUCKET/uv" ~/.local/bin/uv
"""
UV = """#!/usr/bin/env bash
set -e
echo "$*" >>~/uv.calls
mkdir -p .venv/bin
case $* in *install*) test -e pals_jax/cli.py && cp "$BUCKET/trainer" .venv/bin/pals-jax ;; esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A Google Cloud of one's own in a folder, and the scripts run against it."""

    def __init__(self, root: Path):
        self.root = root
        fake = (REPOSITORY / "tests" / "fake_gcloud.py").read_text()
        executable(root / "bin" / "gcloud", f"#!{sys.executable} -IS\n{fake}")
        executable(root / "remote_bin" / "python3", PIP)
        executable(root / "uv", UV)
        self.trainer("exit 0")
        path = f"{root / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "FAKE_GCLOUD": str(root)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Deletes what is left, with what runs there."""
        if self.states:
            self("delete")

    def trainer(self, text: str) -> None:
        """Sets what `pals-jax` does there; $BUCKET is a folder that outlives every TPU."""
        executable(self.root / "trainer", f"#!/usr/bin/env bash\n{text}\n")

    def start(self, script: str, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            # Where tests run in the background of a shell it ignores SIGINT, which is inherited.
            ["env", "--default-signal=INT", LAUNCH / f"{script}.sh", *TPU, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, script: str, *words: str, status: int = 0) -> tuple[str, str]:
        """What a script wrote to stdout and stderr, with the exit status that it must have."""
        process = self.start(script, *words)
        out, err = process.communicate(timeout=90)
        assert process.returncode == status, err
        return out, err

    @property
    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def states(self) -> dict[str, str]:
        """The state of every TPU and request that exists."""
        path = self.root / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"vms": {}, "requests": {}}
        requests = {f"request {name}": r["state"] for name, r in state["requests"].items()}
        return {**state["vms"], **requests}

    def home(self, worker: int = 0) -> Path:
        return self.root / "pals" / f"worker{worker}"

    def wait_for_run(self) -> str:
        """What the run ended with, as status.sh says it."""
        for _ in range(100):
            run = self("status")[0].splitlines()[-1].removeprefix("run ")
            if run != "running":
                return run
        raise AssertionError("the run goes on and on")
