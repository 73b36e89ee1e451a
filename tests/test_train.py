"""Training end to end: through the command line, killed and resumed, evaluated and used."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from pals_jax.cli import main
from pals_jax.config import load
from pals_jax.train import train

CONFIG = Path(__file__).with_name("tiny_experiment.py")


def arguments(small: Path, workdir: Path, *overrides: str) -> list[str]:
    return ["train", f"--config={CONFIG}:{small}", f"--workdir={workdir}", *overrides]


def checkpoint(workdir: Path, folder: str = "checkpoints") -> tuple[int, dict]:
    """The newest checkpoint as it lies on disk: its step and its leaves by path."""
    manager = ocp.CheckpointManager((workdir / folder).resolve())
    step = manager.latest_step()
    tree = manager.restore(step, args=ocp.args.StandardRestore())
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(small: Path) -> Path:
    """The workdir of a finished run."""
    assert main(arguments(small, small / "run")) == 0
    return small / "run"


def test_a_run_learns_and_leaves_everything(run):
    evaluations = [line for line in lines(run) if "score" in line]
    assert [line["step"] for line in evaluations] == [40, 80]
    assert max(line["colour/dev/accuracy"] for line in evaluations) > 0.75  # majority: 0.5
    assert [line["step"] for line in lines(run)] == sorted(line["step"] for line in lines(run))
    assert {"examples_per_second", "learning_rate", "grad_norm"} <= set(lines(run)[0])
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "tokenizer" / "tokenizer.json").exists()
    step, state = checkpoint(run)
    assert step == 80
    assert state["['step']"] == 80


def test_evaluate_gives_the_best_score_again(run, capsys):
    assert main(["evaluate", f"--workdir={run}", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    best = max((line for line in lines(run) if "score" in line), key=lambda line: line["score"])
    assert out["step"] == best["step"]
    for task, splits in out["results"].items():
        for split, metrics in splits.items():
            for metric, value in metrics.items():
                assert value == best[f"{task}/{split}/{metric}"]
    assert main(["evaluate", f"--workdir={run}"]) == 0
    assert "colour" in capsys.readouterr().err


def test_predict_a_file_and_stdin(run, small, capsys, monkeypatch):
    source = small / "colour.tsv"
    assert main(["predict", f"--workdir={run}", "--task=colour", f"--input={source}"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["sentence", "prediction", "p(red)", "p(blue)"]
    assert len(rows) == 61
    for _, prediction, red, blue in rows[1:]:
        assert prediction == ("red" if float(red) > float(blue) else "blue")
        assert float(red) + float(blue) == pytest.approx(1.0, abs=2e-4)

    text = 'the dark box\tdark box\n{"a": "the dark box", "b": "dark box"}\n'
    for task in ("same", "share"):
        monkeypatch.setattr("sys.stdin", iter(text.splitlines(keepends=True)))
        assert main(["predict", f"--workdir={run}", f"--task={task}", "--json"]) == 0
        first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert first == second
        if task == "same":
            assert first["prediction"] in {"yes", "no", "maybe"}
            assert sum(first[f"p({name})"] for name in ("yes", "no", "maybe")) == pytest.approx(1)
        else:
            assert 0.0 <= first["prediction"] <= 2.0


def test_running_it_again_changes_nothing(run, small):
    before, log = checkpoint(run), lines(run)
    assert main(arguments(small, run)) == 0
    after = checkpoint(run)
    assert before[0] == after[0]
    assert all(np.array_equal(before[1][key], after[1][key]) for key in before[1])
    assert lines(run) == log


def test_killed_and_run_again_is_an_unbroken_run_bit_for_bit(small):
    def start(workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "pals_jax", *arguments(small, workdir)]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        with log.open("w") as file:
            return subprocess.Popen(command, env=env, stderr=file)

    log = small / "log"
    whole = start(small / "whole")
    assert whole.wait(timeout=300) == 0, log.read_text()

    broken = start(small / "broken")
    newest = small / "broken" / "checkpoints" / "20"
    deadline = time.monotonic() + 300
    while not newest.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL
    step = checkpoint(small / "broken")[0]
    assert 5 <= step < 80

    again = start(small / "broken")
    assert again.wait(timeout=300) == 0, log.read_text()
    assert f"going on from step {step} of 80" in log.read_text()
    for folder in ("checkpoints", "best"):
        one, two = checkpoint(small / "whole", folder), checkpoint(small / "broken", folder)
        assert one[0] == two[0]
        assert one[1].keys() == two[1].keys()
        for key in one[1]:
            np.testing.assert_array_equal(one[1][key], two[1][key], err_msg=key)
    assert [x["step"] for x in lines(small / "broken")] == [
        x["step"] for x in lines(small / "whole")
    ]


def test_one_compilation_serves_all_tasks(small, caplog):
    config = load([f"--config={CONFIG}:{small}", "--config.sampling=round_robin"])
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax._src.interpreters.pxla"):
        train(config, small / "run")
    messages = [record.getMessage() for record in caplog.records]
    steps = [message for message in messages if message.startswith("Compiling jit(train_step)")]
    lengths = {re.search(r"int32\[8,(\d+)\]", message).group(1) for message in steps}
    # 80 steps of three tasks in turn: one compilation for each padded length, none for a task.
    assert 1 <= len(steps) == len(lengths) <= 4


def test_an_encoder_from_the_hub_in_the_old_names(small, tiny_encoder, monkeypatch):
    """bert-base-uncased has nested names, gamma and beta, and pre-training heads."""
    hub = small / "hub"
    shutil.copytree(tiny_encoder, hub)
    tensors = safetensors.numpy.load_file(hub / "model.safetensors")
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in tensors.items()
    }
    old["cls.predictions.bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(old, hub / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(hub)
    )
    overrides = ("--config.encoder=someone/some-bert", "--config.epochs=1")
    assert main(arguments(small, small / "run", *overrides, "--config.steps_per_epoch=2")) == 0
    assert set(asked) == {"someone/some-bert"}
    assert main(["evaluate", f"--workdir={small / 'run'}", "--json"]) == 0


def test_divergence_is_said(small, capsys):
    workdir = small / "run"
    assert main(arguments(small, workdir, "--config.optimizer.learning_rate=1e30")) == 2
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert list((workdir / "best").glob("[0-9]*")) == []


def test_data_may_move_between_two_starts(run, small, capsys):
    (small / "colour.tsv").rename(small / "moved.tsv")
    assert main(["evaluate", f"--workdir={run}"]) == 2
    assert "colour.tsv" in capsys.readouterr().err
    moved = [f"--config.data.own.colour.{x}={small / 'moved.tsv'}" for x in ("train", "dev")]
    assert main(arguments(small, run, *moved)) == 0
    assert main(["evaluate", f"--workdir={run}"]) == 0


def test_frozen_encoder_and_mixed_batches(small):
    overrides = ("--config.trainable=('adapters/',)", "--config.groups=4", "--config.epochs=1")
    assert main(arguments(small, small / "run", *overrides)) == 0
    _, state = checkpoint(small / "run")
    moments = [key for key in state if "opt_state" in key and "embeddings" in key]
    assert moments == []
    assert any("opt_state" in key and "pal" in key for key in state)
    assert any("frozen" in key and "embeddings" in key for key in state)
