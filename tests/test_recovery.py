"""Runs never lose work: killed, stopped, on damaged, full or vanished disks, on other devices."""

import errno
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import of_pairs
from test_train import arguments, checkpoint, lines

from pals_jax.cli import main
from pals_jax.experiment import checkpoint as checkpoints


def start(
    small: Path, workdir: Path, *overrides: str, devices: int = 2, shell: str = ""
) -> subprocess.Popen:
    """The run as a process of its own, after `shell`; its log is beside the workdir."""
    command = [sys.executable, "-m", "pals_jax", *arguments(small, workdir, *overrides)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    log = shlex.quote(str(workdir.with_suffix(".log")))
    script = f'exec 2> >(cat >>{log}); {shell} exec "$@"'
    return subprocess.Popen(["bash", "-c", script, "run", *command], env=env)


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: the newest and the best checkpoint, and the steps and losses of the log."""
    for folder in ("checkpoints", "best"):
        (step, mine), (last, other) = checkpoint(one, folder), checkpoint(two, folder)
        assert step == last
        assert mine.keys() == other.keys()
        for key, x in mine.items():
            np.testing.assert_array_equal(x, other[key], err_msg=key)
    mine, other = ([x for x in lines(w) if "score" in x] for w in (one, two))
    assert mine == other


def wait_for(path: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 300
    while not path() and time.monotonic() < deadline:
        assert process is None or process.poll() is None
        time.sleep(0.002)


def newest(workdir: Path) -> int:
    return max(
        (int(p.name) for p in workdir.glob("checkpoints/[0-9]*") if p.name.isdigit()), default=0
    )


@pytest.mark.parametrize(
    ("kills", "model"),
    [
        pytest.param(2, "encoder", marks=pytest.mark.slow),
        pytest.param(20, "encoder", marks=pytest.mark.nightly),
        pytest.param(20, "encoder-decoder", marks=pytest.mark.nightly),
    ],
)
def test_killed_and_run_again_is_an_unbroken_run_bit_for_bit(
    small: Path, kills: int, model: str, request: pytest.FixtureRequest
) -> None:
    """Killed at random moments, most of them while a checkpoint is being written."""
    every = ("--config.checkpoint_every=1", f"--config.steps_per_epoch={5 * kills // 2}")
    if model == "encoder-decoder":
        every = (*of_pairs(request.getfixturevalue("pairs")), *every)
    whole, broken = small / "whole", small / "broken"
    assert start(small, whole, *every).wait(timeout=600) == 0, whole.with_suffix(".log").read_text()

    rng, at = random.Random(0), []
    for _ in range(kills):
        process = start(small, broken, *every)
        begin = newest(broken)
        wait_for(lambda begin=begin: newest(broken) > begin, process)
        time.sleep(rng.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        at.append(newest(broken))
    assert at == sorted(set(at))
    assert start(small, broken, *every).wait(timeout=600) == 0
    assert f"going on from step {at[-1]}" in broken.with_suffix(".log").read_text()
    assert_same_run(whole, broken)


@pytest.mark.slow
def test_told_to_stop_it_saves_and_says_so(small: Path, capsys: pytest.CaptureFixture) -> None:
    """SIGTERM: exit status 143; run again, it is an unbroken run."""
    every = ("--config.steps_per_epoch=10",)
    whole, broken = small / "whole", small / "broken"
    assert main(arguments(small, whole, *every)) == 0

    def tell() -> None:
        wait_for(lambda: newest(broken))
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    before = signal.getsignal(signal.SIGTERM)
    assert main(arguments(small, broken, *every)) == 143
    teller.join()
    assert signal.getsignal(signal.SIGTERM) is before
    step, _ = checkpoint(broken)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"pals-jax: told to stop; step {step} of 20 is saved in {broken};")
    assert main(arguments(small, broken, *every)) == 0
    assert f"going on from step {step} of 20" in capsys.readouterr().err
    assert_same_run(whole, broken)


@pytest.fixture(scope="module")
def whole(small_of_module: Path) -> Path:
    """A run that nothing disturbs."""
    workdir = small_of_module / "whole"
    assert main(arguments(small_of_module, workdir)) == 0
    return workdir


MOMENTS = {
    "save": (ocp.CheckpointManager, "save"),
    "seal": (checkpoints, "_seal"),
    "rename": (ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize"),
    "best": (checkpoints.Checkpoints, "save_best"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fault_while_saving_loses_nothing(
    whole: Path, moment: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at the second call; run again, it is an unbroken run."""
    broken = whole.with_name(moment)
    owner, name = MOMENTS[moment]
    real, calls = getattr(owner, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.EIO, "the disk fails")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        assert main(arguments(whole.parent, broken)) in (2, 75)
    assert len(calls) > 1
    assert "the disk fails" in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments(whole.parent, broken)) == 0
    assert_same_run(whole, broken)


def damage(directory: Path) -> None:
    """Cuts the largest file of a checkpoint to its half."""
    largest = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    whole: Path, capsys: pytest.CaptureFixture
) -> None:
    small, run = whole.parent, whole.with_name("run")
    shutil.copytree(whole, run)
    damage(run / "checkpoints" / "8")
    assert main(arguments(small, run)) == 0
    err = capsys.readouterr().err
    assert "the checkpoint of step 8" in err
    assert "is damaged (1 of its files changed since they were written); it is set aside" in err
    assert "going on from step 6 of 8" in err
    assert (run / "checkpoints" / "damaged-8.1").is_dir()
    assert_same_run(whole, run)

    for step in ("6", "8"):
        damage(run / "checkpoints" / step)
    assert main(arguments(small, run)) == 2
    assert "there is no earlier one" in capsys.readouterr().err.splitlines()[-1]
    assert len(list(run.glob("checkpoints/damaged-*"))) == 3


@pytest.mark.nightly
@pytest.mark.all_devices
def test_it_goes_on_with_other_devices(small: Path) -> None:
    """Two devices begin, eight go on: the same tasks, examples and masks, so the same losses."""
    begun, whole = small / "begun", small / "whole"
    assert start(small, begun, "--config.epochs=2").wait(timeout=300) == 0
    assert main(arguments(small, whole)) == 0
    shutil.rmtree(begun / "checkpoints" / "8")
    shutil.rmtree(begun / "best")
    assert main(arguments(small, begun)) == 0
    for mine, other in zip(lines(begun), lines(whole), strict=True):
        for line in (mine, other):
            line.pop("examples_per_second", None)
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_disk_that_is_full(small: Path) -> None:
    """No file may grow beyond 6 kB: the largest of the parameters, of 7, does not fit."""
    run = small / "run"
    assert start(small, run, shell="ulimit -f 6;").wait(timeout=300) == 2
    log = run.with_suffix(".log")
    wait_for(lambda: "pals-jax:" in log.read_text())
    message = next(x for x in log.read_text().splitlines() if x.startswith("pals-jax:"))
    assert "a checkpoint could not be written to" in message
    assert "make room" in message


@pytest.mark.slow
def test_a_workdir_that_vanishes(small: Path, capsys: pytest.CaptureFixture) -> None:
    run = small / "run"

    def remove() -> None:
        wait_for(lambda: newest(run))
        run.rename(small / "elsewhere")

    remover = threading.Thread(target=remove)
    remover.start()
    assert main(arguments(small, run, "--config.steps_per_epoch=15")) == 2
    remover.join()
    assert f"{run} has vanished" in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(run, ignore_errors=True)  # what the last save left behind
    (small / "elsewhere").rename(run)
    assert main(arguments(small, run, "--config.steps_per_epoch=15")) == 0
