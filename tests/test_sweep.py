"""Sweeps: one run for each override, and one table of all runs."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_train import arguments, checkpoint, lines

from pals_jax.cli import main
from pals_jax.experiment import workdir as workdir_lib
from pals_jax.inference.evaluator import Results
from pals_jax.runtime import distributed
from pals_jax.training import sweep
from pals_jax.training.run_writer import RunWriter
from pals_jax.training.step import TrainState
from pals_jax.training.vmapped_runs import share_frozen

CONFIG = Path(__file__).with_name("tiny_experiment.py")


@pytest.mark.slow
def test_a_sweep_trains_every_run_and_makes_one_table(
    small: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, programs = sweep.train, jax.devices()[0].client.live_executables
    begin, end = [], []  # how many there are when a run begins, and when it ends

    def trained(*given: Any) -> Results:
        begin.append(len(programs()))
        results = real(*given)
        end.append(len(programs()))
        return results

    monkeypatch.setattr(sweep, "train", trained)
    overrides = [{"seed": 0, "method": "shared"}, {"optimizer.learning_rate": 0.01, "seed": 1}]
    command = ["train", f"--config={CONFIG}:{small}", f"--workdir={small / 'sweep'}", "--sweep"]
    command += [f"--config.sweep={tuple(overrides)}", "--config.epochs=1"]
    assert main(command) == 0
    rows = json.loads((small / "sweep" / "sweep.json").read_text())
    assert sorted(row["workdir"] for row in rows) == [
        "learning_rate=0.01,seed=1",
        "seed=0,method=shared",
    ]
    assert rows[0]["score"] >= rows[1]["score"]
    for row in rows:
        assert row["overrides"] in overrides
        run = workdir_lib.load(small / "sweep" / row["workdir"])
        assert run.config.seed == row["overrides"]["seed"]
        assert row["scores"]["colour"] == row["results"]["colour"]["dev"]["accuracy"]
        assert row["score"] == pytest.approx(sum(row["scores"].values()) / 3)
    assert begin[1] < end[0] / 4  # or some dozens of runs would use up the memory maps
    table = capsys.readouterr().err.split("sweep, dev scores")[1]
    assert all(word in table for word in ("optimizer.learning_rate", "seed", "colour", "mean"))

    assert main(command) == 0  # finished runs are not trained again
    assert json.loads((small / "sweep" / "sweep.json").read_text()) == rows


@pytest.fixture
def without_pooler(small: Path) -> Path:
    """The small experiment's directory, its encoder a copy whose pooler comes of the seed."""
    bare = small / "bare"
    shutil.copytree(small / "encoder", bare)
    tensors = load_file(bare / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) < len(tensors)
    save_file(kept, bare / "model.safetensors")
    (small / "encoder").unlink()
    return bare.rename(small / "encoder").parent


FROZEN = ("--config.trainable=('adapters/',)", "--config.method=houlsby(size=4)")
RATES = [{"optimizer.learning_rate": rate} for rate in (1e-3, 1e-2)]
BOTH = [{"seed": 1} | RATES[0], {"seed": 2} | RATES[1]]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(RATES, marks=pytest.mark.slow, id="one seed"),
        pytest.param(BOTH, marks=pytest.mark.nightly, id="two seeds"),
    ],
)
def test_what_one_step_trains_is_what_is_trained_alone(
    without_pooler: Path, overrides: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, moments and results; the sweep is told to stop, and goes on, half way."""
    small, workdirs = without_pooler, []
    real = sweep.train_together
    monkeypatch.setattr(
        sweep, "train_together", lambda configs, at: workdirs.append(at) or real(configs, at)
    )
    command = [*arguments(small, small / "sweep", *FROZEN), "--sweep"]
    command.append(f"--config.sweep={tuple(overrides)}")
    monkeypatch.setattr(distributed.Preemption, "reached", lambda self, step: step == 5)
    assert main(command) == 143
    monkeypatch.undo()
    assert main(command) == 0
    assert [len(at) for at in workdirs] == [2]
    for row in json.loads((small / "sweep" / "sweep.json").read_text()):
        changes = [f"--config.{key}={value}" for key, value in row["overrides"].items()]
        together, alone = small / "sweep" / row["workdir"], small / row["workdir"]
        assert main(arguments(small, alone, *FROZEN, *changes)) == 0
        for folder in ("checkpoints", "best"):
            (step, mine), (last, other) = (checkpoint(at, folder) for at in (together, alone))
            assert (step, mine.keys()) == (last, other.keys())
            for key, x in mine.items():
                np.testing.assert_allclose(x, other[key], rtol=0, atol=1e-5, err_msg=key)
        mine, other = ([x for x in lines(at) if "score" in x] for at in (together, alone))
        assert len(mine) == len(other) == 2
        for x, y in zip(mine, other, strict=True):
            assert x == pytest.approx(y, abs=1e-5)


@pytest.mark.slow
def test_a_signal_during_the_last_evaluation_stops_before_the_next_run(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the sweep goes on from there."""
    command = ["train", f"--config={CONFIG}:{small}", f"--workdir={small / 'sweep'}", "--sweep"]
    command += ["--config.sweep=({'method': 'lhuc()'}, {'method': 'bitfit()'})"]
    command += [
        "--config.epochs=1",
        "--config.steps_per_epoch=2",
        "--config.trainable=('adapters/',)",
    ]
    real = RunWriter.evaluate

    def told(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    monkeypatch.setattr(RunWriter, "evaluate", told)
    assert main(command) == 143
    finished = [path.parent.name for path in (small / "sweep").glob("*/best")]
    assert len(finished) == 1
    monkeypatch.undo()
    assert main(command) == 0
    assert len(json.loads((small / "sweep" / "sweep.json").read_text())) == 2


def test_what_is_frozen_alike_is_in_memory_once() -> None:
    """As states are made or restored, one after the other; what differs stays."""

    def state(seed: float) -> TrainState:
        ones, other = jnp.ones((2, 3)), jnp.full(4, seed)
        return TrainState(0, {"params": ones}, {"encoder": ones, "pooler": other}, ())

    first, second, third = share_frozen(state(seed) for seed in (0.0, 0.0, 1.0))
    assert first.frozen["encoder"] is second.frozen["encoder"] is third.frozen["encoder"]
    assert first.frozen["pooler"] is second.frozen["pooler"]
    np.testing.assert_array_equal(third.frozen["pooler"], np.ones(4))


@pytest.mark.slow
def test_a_run_that_diverges_holds_up_no_other(small: Path, capsys: pytest.CaptureFixture) -> None:
    """Neither those that are trained with it in one step, nor those behind it."""
    rates = [{"optimizer.learning_rate": rate} for rate in (1e-3, 1e30)]
    rates.append({"optimizer.learning_rate": 1e30, "method": "lhuc()"})
    command = ["train", f"--config={CONFIG}:{small}", f"--workdir={small / 'sweep'}", "--sweep"]
    command += [f"--config.sweep={tuple(rates)}", "--config.trainable=('adapters/',)"]
    command.append("--config.method=shared")
    assert main([*command, "--config.epochs=1"]) == 0
    assert "diverged: in step" in (said := capsys.readouterr().err)
    good, *bad = json.loads((small / "sweep" / "sweep.json").read_text())
    assert good["overrides"] == rates[0]
    assert good["score"] > 0
    for row in bad:
        assert (row["results"], row["scores"], row["score"]) == (None, {}, None)
    assert said.split("sweep, dev scores")[1].count("diverged") == 2


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ((), "sweep is empty"),
        (({"seed": 1}, {"seed": 1}), "names a run twice"),
        ("({'seed': 0})", "sweep has 'seed', which is not a {key: value}"),  # no comma after it
        (({}, {"seed": 1}), "sweep has {}, which is no"),
        (({0: 1},), "sweep has {0: 1}, which is no"),
        (({"sede": 1},), "the overrides {'sede': 1}"),
        (({"seed": "one"},), "the overrides {'seed': 'one'}"),
        (({"seed": 1}, {"method": "nope"}), "nope"),
        (({"seed": 1}, {"optimizer.name": "sgd"}), "sgd"),
        (({"seed": 1}, {"sampling": "some"}), "some"),
    ],
)
def test_a_sweep_that_cannot_be(
    small: Path, capsys: pytest.CaptureFixture, sweep: object, message: str
) -> None:
    command = ["train", f"--config={CONFIG}:{small}", f"--workdir={small / 'sweep'}", "--sweep"]
    assert main([*command, f"--config.sweep={sweep}"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (small / "sweep").exists()
