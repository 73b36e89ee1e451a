"""A workdir and a task file of the previous release, in `written_before/`, can still be read.

The commit before the package had rooms wrote them, from the tiny encoder and the tasks of the
fixture `small`: a frozen encoder with prefixes, PALs and a separate pooler for each task.
"""

import io
import json
from pathlib import Path

import pytest

from pals_jax.cli import main

WRITTEN = Path(__file__).with_name("written_before")
# What that commit answered.
COLOUR = {"red old box": ("red", 0.5001433491706848), "blue cup on a hat": ("red", 0.50145912)}
SAME = {("red old box", "red old box"): 0.34940996766, ("blue cup", "green pen"): 0.34157541394}


def predict(workdir: Path, task: str, text: str, capsys, monkeypatch) -> list[dict]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["predict", f"--workdir={workdir}", f"--task={task}", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_workdir_still_predicts(capsys, monkeypatch) -> None:
    for row in predict(WRITTEN, "colour", "\n".join(COLOUR), capsys, monkeypatch):
        label, probability = COLOUR[row["sentence"]]
        assert row["prediction"] == label
        assert row["p(red)"] == pytest.approx(probability, abs=1e-6)


def test_a_task_file_still_goes_onto_its_base(tmp_path: Path, capsys, monkeypatch) -> None:
    file, base = WRITTEN / "same.task", f"--base={WRITTEN}"
    assert main(["convert", f"--workdir={tmp_path / 'new'}", base, "--files", str(file)]) == 0
    text = "\n".join("\t".join(pair) for pair in SAME)
    for row in predict(tmp_path / "new", "same", text, capsys, monkeypatch):
        assert row["p(yes)"] == pytest.approx(SAME[row["a"], row["b"]], abs=1e-6)
