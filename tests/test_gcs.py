"""Workdirs in a bucket of Google Cloud Storage, played by a server on this machine."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_gcs
import pytest
from etils import epath
from gcsfs.retry import HttpError
from test_recovery import assert_same_run, newest, wait_for
from test_train import arguments, lines

from pals_jax.cli import main
from pals_jax.experiment import workdir as workdir_lib
from pals_jax.runtime import distributed, storage
from pals_jax.runtime.errors import Unavailable, UserError


@pytest.fixture(scope="module")
def bucket() -> Iterator[epath.Path]:
    """An empty bucket; there is another that may be read only."""
    with (
        fake_gcs.serve("bucket", fake_gcs.READ_ONLY) as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # for gcsfs, and Google's own library
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "of TensorStore")
        patch.setenv("NO_GCE_CHECK", "true")
        yield storage.workdir("gs://bucket")


@pytest.fixture(scope="module")
def whole(small_of_module: Path) -> Path:
    """A run in a directory that was never stopped."""
    workdir = small_of_module / "whole"
    assert main(arguments(small_of_module, workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def run(small_of_module: Path, bucket: epath.Path) -> epath.Path:
    """The same in the bucket, told to stop after step 5 and gone on with."""
    workdir = bucket / "of" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.Preemption, "reached", lambda _, step: step == 5)
        assert main(arguments(small_of_module, workdir)) == 143
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4", "5"]
    assert [line["step"] for line in lines(workdir)] == [3, 4, 4, 5]
    assert main(arguments(small_of_module, workdir)) == 0
    return workdir


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(whole: Path, run: epath.Path) -> None:
    """And leaves what it leaves in a directory."""
    assert_same_run(whole, run)
    assert [line["step"] for line in lines(run)] == [3, 4, 4, 5, 6, 8, 8]
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    boards = list((run / "tensorboard").iterdir())
    assert len(boards) == 2
    assert all(b"loss" in board.read_bytes() for board in boards)


@pytest.mark.slow
def test_it_is_evaluated_and_predicts(
    whole: Path, run: epath.Path, capsys: pytest.CaptureFixture
) -> None:
    source = f"--input={whole.parent / 'colour.tsv'}"
    for command in (["evaluate", "--json"], ["predict", "--json", "--task=colour", source]):
        for workdir in (whole, run):
            assert main([*command, f"--workdir={workdir}"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[: len(out) // 2] == out[len(out) // 2 :]


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    whole: Path, run: epath.Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = run / "checkpoints" / "8"
    largest = max(storage.files(damaged), key=lambda path: path.stat().length)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert main(arguments(whole.parent, run)) == 0
    err = capsys.readouterr().err
    assert "is damaged (1 of its files changed since they were written); it is set aside" in err
    assert "going on from step 6 of 8" in err
    aside = run / "checkpoints" / "damaged-8.1"
    assert [path.relative_to(aside) for path in storage.files(aside)]
    assert_same_run(whole, run)


@pytest.mark.slow
def test_what_is_refused(
    small: Path, bucket: epath.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, message in (
        (arguments(small, epath.Path("gs://nowhere/run")), "there is no such bucket"),
        (["evaluate", "--workdir=gs://nowhere/run"], "there is no such bucket"),
        (["evaluate", f"--workdir={bucket}/nothing"], "is not the workdir of a run"),
        (arguments(small, epath.Path(f"gs://{fake_gcs.READ_ONLY}/run")), "Forbidden"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("pals-jax: gs://")
        assert message in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for workdir, message in (("gs://bucket/run", "pip install"), ("s3://x", "neither a directory")):
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", f"--workdir={workdir}"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HttpError({"code": 503, "message": "busy"}), 75),
        (HttpError({"code": 403, "message": "not yours"}), 2),
        (ValueError("UNAVAILABLE: All attempts to connect failed"), 75),  # of TensorStore
        (FileNotFoundError("bucket/run"), 2),
    ],
)
def test_what_may_go_well_later_has_a_status_of_its_own(error: Exception, status: int) -> None:
    path, refused = epath.Path("gs://bucket/run"), "cannot be read or written"
    with pytest.raises(UserError, match=refused) as raised, storage.reported(path):
        raise error
    assert raised.value.status == status


def test_a_bucket_that_fails_while_a_run_is_read(
    bucket: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = bucket / "read"
    storage.write_text(workdir / "experiment.json", "{}")

    def fail(_: epath.Path) -> str:
        raise HttpError({"code": 503, "message": "busy"})

    monkeypatch.setattr(type(workdir), "read_text", fail)
    with pytest.raises(Unavailable, match="cannot be read or written"):
        workdir_lib.load(workdir)


@pytest.mark.nightly
def test_killed_and_run_again_is_an_unbroken_run_bit_for_bit(
    small: Path, bucket: epath.Path
) -> None:
    """Three times at random moments; twenty times in test_recovery.py, on a disk."""

    def start(workdir: epath.Path | Path) -> subprocess.Popen:
        every = ("--config.checkpoint_every=1", "--config.steps_per_epoch=8")
        command = [sys.executable, "-m", "pals_jax", *arguments(small, workdir, *every)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        return subprocess.Popen(command, env=env)

    whole, broken = small / "whole", bucket / "broken"
    assert start(whole).wait(timeout=300) == 0
    rng = random.Random(0)
    for _ in range(3):
        process = start(broken)
        begin = newest(broken)
        wait_for(lambda begin=begin: newest(broken) > begin + 1, process)
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(broken).wait(timeout=300) == 0
    assert_same_run(whole, broken)


FROZEN = ("--config.trainable=('adapters/',)", "--config.epochs=1")


@pytest.mark.nightly
def test_tasks_are_added_and_trained_alone(
    small: Path, bucket: epath.Path, capsys: pytest.CaptureFixture
) -> None:
    old, new, alone = (bucket / name for name in ("old", "new", "alone"))
    two, one = "--config.tasks=('colour','share')", "--config.tasks=('same',)"
    assert main(arguments(small, old, two, *FROZEN)) == 0
    assert main(arguments(small, new, one, *FROZEN, f"--base={old}")) == 0
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={new}", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["results"]) == {"colour", "share", "same"}
    assert main(arguments(small, alone, "--separate", two, *FROZEN)) == 0
    assert set(json.loads((alone / "results.json").read_text())) == {"colour", "share"}


@pytest.mark.nightly
def test_a_sweep_an_ablation_and_task_files(
    small: Path, bucket: epath.Path, capsys: pytest.CaptureFixture
) -> None:
    runs, file = bucket / "sweep", small / "colour.task"
    sweep = "--config.sweep=({'seed': 0}, {'seed': 1})"
    method = "--config.method=houlsby(size=6)"
    assert main(arguments(small, runs, "--sweep", sweep, method, *FROZEN)) == 0
    assert len(json.loads((runs / "sweep.json").read_text())) == 2

    run = runs / "seed=0"
    assert main(["evaluate", f"--workdir={run}", "--ablate"]) == 0
    assert (run / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert main(["convert", f"--workdir={run}", "--task=colour", f"--out={file}"]) == 0
    made = f"--workdir={bucket}/made"
    assert main(["convert", made, f"--base={run}", "--files", str(file)]) == 0
    source = f"--input={small / 'colour.tsv'}"
    capsys.readouterr()
    for workdir in (f"--workdir={run}", made):
        assert main(["predict", workdir, "--task=colour", source]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[: len(out) // 2] == out[len(out) // 2 :]
