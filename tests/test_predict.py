"""Submission files from a real run, with GLUE's real test sets."""

import zipfile
from pathlib import Path

import pytest
from test_submission import assert_the_server_accepts

from pals_jax.cli import main
from pals_jax.inference import submission

CONFIG = Path(__file__).with_name("tiny_experiment.py")


@pytest.mark.slow
def test_submission_from_a_run(small, shared, capsys):
    workdir, out = small / "run", small / "submission"
    overrides = [
        "--config.tasks=('wnli','cola')",
        "--config.data.source=glue_dir",
        f"--config.data.dir={shared / 'glue'}",
        "--config.epochs=1",
        "--config.steps_per_epoch=2",
        "--config.eval_batch_size=128",
    ]
    assert main(["train", f"--config={CONFIG}:{small}", f"--workdir={workdir}", *overrides]) == 0
    predict = ["predict", f"--workdir={workdir}", f"--submission={out}"]
    assert main(predict) == 2
    assert "RTE.tsv" in capsys.readouterr().err
    assert not out.exists()

    assert main([*predict, "--fill-missing"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.strip() == str(out / submission.ZIP)
    assert "RTE.tsv has no predictions" in stderr
    assert "CoLA.tsv" not in stderr
    assert_the_server_accepts(out / submission.ZIP)
    with zipfile.ZipFile(out / submission.ZIP) as archive:
        assert len(archive.namelist()) == 11
        rows = archive.read("CoLA.tsv").decode().splitlines()
    assert len(rows) == 1064
    assert {row.split("\t")[1] for row in rows[1:]} <= {"0", "1"}
