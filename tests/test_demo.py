"""The README's first command, complete: real weights, bundled tasks, scores above baseline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pals_jax.cli import main
from pals_jax.data import metrics

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.py"


@pytest.mark.optimized
def test_an_installed_package_carries_its_data(tmp_path):
    """The README's first command installs a copy, not the checkout."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path, CONFIG.parents[1]], check=True)
    code = (
        "import pathlib, pals_jax; from pals_jax.data import demo;"
        "print(pals_jax.__file__, all(pathlib.Path(t[s]).stat().st_size > 1000"
        " for t in demo.TASKS.values() for s in ('train', 'dev')))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True)
    assert done.stdout.decode().split() == [str(tmp_path / "pals_jax" / "__init__.py"), "True"]


@pytest.mark.optimized
def test_the_demo_learns_all_four_tasks(minilm, tmp_path, capsys):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    workdir = tmp_path / "demo"
    assert main(["train", f"--config={CONFIG}", f"--workdir={workdir}", cache]) == 0
    err = capsys.readouterr().err
    for said in ("majority", "sentiment", "pals-jax predict --workdir="):
        assert said in err
    assert main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    # Majority baselines: 0.50, 0.50, 0.33 and a correlation of 0.
    assert results["sentiment"]["dev"]["accuracy"] > 0.85
    assert results["paraphrase"]["dev"]["accuracy"] > 0.85
    assert results["entailment"]["dev"]["accuracy"] > 0.45
    assert results["similarity"]["dev"]["pearson"] > 0.7
    assert metrics.pals_average(results) is None
