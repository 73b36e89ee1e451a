"""The notebooks run from top to bottom, and their text states what comes out."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = REPOSITORY / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
URL = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def cells(name: str) -> list[dict]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_and_installs_what_is_missing(name: str) -> None:
    first, install, *_ = ("".join(cell["source"]) for cell in cells(name))
    place = URL.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb"
    assert first.startswith("# ")
    assert f"({link})" in first
    assert install.startswith("try:\n    import pals_jax\nexcept ImportError:")
    assert f"git+{URL}" in install
    for page in ("README.md", "docs/colab.md"):
        assert link in (REPOSITORY / page).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_its_outputs(name: str) -> None:
    """If this fails, run notebooks/execute.py."""
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert re.search(r"\d<!-- .+ ± \S+ -->", json.dumps(cells(name), ensure_ascii=False))


TRAINED = [
    pytest.param(name, marks=pytest.mark.optimized) for name in NAMES if name != "checkpoints"
]


@pytest.mark.parametrize("name", [pytest.param("checkpoints", marks=pytest.mark.slow), *TRAINED])
def test_a_notebook_runs_and_its_figures_are_as_stated(name: str, minilm: Path) -> None:
    command = [sys.executable, NOTEBOOKS / "execute.py", "--check", NOTEBOOKS / f"{name}.ipynb"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "all figures are as stated" in done.stdout
