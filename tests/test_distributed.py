"""Several processes with two devices each on this machine take the same run as one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import of_pairs
from flax.traverse_util import flatten_dict

import pals_jax
from pals_jax.cli import main
from pals_jax.runtime import distributed
from pals_jax.runtime.errors import Unavailable, UserError

CONFIG = Path(__file__).with_name("tiny_experiment.py")
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
STEPS = 8
GENERATES = """
import json, sys
import pals_jax
from pals_jax.runtime import distributed
workdir, sources, address, process = sys.argv[1:]
distributed.connect(address, 2, int(process))
run = pals_jax.load(workdir)
texts = [x.text for x in run.predict(json.loads(sources), task="all")]
print(json.dumps([texts, run.evaluate()]))
"""


def start(small: Path, workdir: Path, processes: int, *overrides: str) -> list[subprocess.Popen]:
    """The processes of one run, each with a log `workdir.I.log`."""
    command = [sys.executable, "-m", "pals_jax", "train", f"--config={CONFIG}:{small}"]
    command += [f"--workdir={workdir}", f"--coordinator={coordinator()}", *overrides]
    started = []
    for i in range(processes):
        with log(workdir, i).open("w") as file:
            mine = [f"--processes={processes}", f"--process={i}"]
            started.append(subprocess.Popen([*command, *mine], env=ENVIRONMENT, stderr=file))
    return started


def coordinator() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def log(workdir: Path, process: int) -> Path:
    return workdir.with_name(f"{workdir.name}.{process}.log")


def ends(started: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=300) for process in started]


def metrics(workdir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("examples_per_second", None)
    return lines


def newest(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Step and parameters, wherever they were saved."""
    handler = ocp.StandardCheckpointHandler()
    manager = ocp.CheckpointManager((workdir / "checkpoints").resolve(), item_handlers=handler)
    step = manager.latest_step()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        dict(manager.item_metadata(step)),
    )
    tree = manager.restore(step, args=ocp.args.StandardRestore(target))
    return step, flatten_dict(tree["trainable"], sep="/")


def assert_one_run(workdir: Path, whole: Path) -> None:
    """Two runs are one but for the order in which sums were taken."""
    for mine, other in zip(metrics(workdir), metrics(whole), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
    (step, mine), (last, other) = newest(workdir), newest(whole)
    assert step == last == STEPS
    for path, x in other.items():
        np.testing.assert_allclose(mine[path], x, rtol=0, atol=2e-5, err_msg=path)


@pytest.fixture(scope="module")
def whole(small_of_module: Path) -> Path:
    """The run of one process with eight devices."""
    workdir = small_of_module / "whole"
    assert main(["train", f"--config={CONFIG}:{small_of_module}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.mark.slow
def test_nothing_is_computed_before_the_processes_have_met() -> None:
    """JAX has not looked for devices when all is imported; it refuses to be joined after that."""
    code = (
        "import jax, pals_jax.inference.predict, pals_jax.training.plan.plan;"
        "import pals_jax.training.train;"
        "jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices()))"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout == b"3\n"


@pytest.mark.parametrize(
    "processes",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.nightly)],
)
def test_several_processes_make_the_run_of_one(whole: Path, processes: int) -> None:
    """Losses, dev metrics and checkpoint; what is said, host 0 alone says."""
    workdir = whole.with_name(f"{processes} hosts")
    assert ends(start(whole.parent, workdir, processes)) == [0] * processes
    assert_one_run(workdir, whole)
    assert "dev scores" in log(workdir, 0).read_text()
    for process in range(1, processes):
        said = log(workdir, process).read_text()
        assert "scores" not in said
        assert "step" not in said
    assert len(list((workdir / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_all(whole: Path) -> None:
    """And the run goes on, with the same tasks and examples, on other hosts and devices."""
    workdir = whole.with_name("stopped")
    started = start(whole.parent, workdir, 2, "--config.checkpoint_every=1")
    deadline = time.monotonic() + 300
    while not list(workdir.glob("checkpoints/[12]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    assert ends(started) == [143, 143], log(workdir, 0).read_text()
    step, _ = newest(workdir)
    assert f"told to stop; step {step} of {STEPS} is saved" in log(workdir, 0).read_text()
    assert 1 <= step < STEPS

    command = ["train", f"--config={CONFIG}:{whole.parent}", f"--workdir={workdir}"]
    assert main([*command, "--config.checkpoint_every=3"]) == 0
    mine, other = ({line["step"]: line for line in metrics(w)} for w in (workdir, whole))
    assert mine[STEPS]["same/dev/accuracy"] == other[STEPS]["same/dev/accuracy"]
    for path, x in newest(whole)[1].items():
        np.testing.assert_allclose(newest(workdir)[1][path], x, rtol=0, atol=2e-5, err_msg=path)


@pytest.mark.nightly
def test_two_processes_write_the_texts_of_one(pairs_of_module: Path) -> None:
    """Each of them gets all texts, of both tasks, and their scores."""
    workdir = pairs_of_module / "pairs"
    command = ["train", f"--config={CONFIG}:{pairs_of_module}", f"--workdir={workdir}"]
    assert (
        main([*command, *of_pairs(pairs_of_module), "--config.optimizer.learning_rate=0.03"]) == 0
    )
    lines = (pairs_of_module / "upper.tsv").read_text().splitlines()[1:]
    sources = [line.split("\t")[0] for line in lines]
    run = pals_jax.load(workdir)
    alone, scores = [x.text for x in run.predict(sources, task="all")], run.evaluate()
    assert len(alone) == 2 * len(sources)
    assert len(set(alone)) > 20
    given = [sys.executable, "-c", GENERATES, str(workdir), json.dumps(sources), coordinator()]
    started = [
        subprocess.Popen([*given, str(i)], env=ENVIRONMENT, stdout=subprocess.PIPE) for i in (0, 1)
    ]
    for out, _ in [process.communicate(timeout=300) for process in started]:
        texts, evaluated = json.loads(out.splitlines()[-1])  # behind what the connection reports
        assert texts == alone
        assert evaluated.keys() == scores.keys() == {"upper", "swap"}
        for task, splits in scores.items():
            assert evaluated[task]["dev"] == pytest.approx(splits["dev"], rel=1e-5)


@pytest.mark.parametrize("given", [("127.0.0.1:1", None, 0), (None, 2, None)])
def test_half_an_address_is_refused(given: tuple) -> None:
    with pytest.raises(UserError, match="go together"):
        distributed.connect(*given)


def test_waiting_for_others_is_said_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def initialize(**given: object) -> None:
        assert given["initialization_timeout"] == 300
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(Unavailable, match="did not find each other") as raised:
        distributed.connect("nowhere:1", 2, 1)
    assert raised.value.status == 75
    assert capsys.readouterr().err == "waiting for 2 processes at nowhere:1, at most 300 s\n"


def test_slurm_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the environment speaks of several processes, JAX finds them; here it cannot."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    distributed.connect(None, None, None)  # a batch script, which is one process
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    with pytest.raises(UserError, match="did not find each other"):
        distributed.connect(None, None, None)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    distributed.connect(None, None, None)
