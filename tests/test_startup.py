"""Starting a command imports nothing heavy before it is needed, and looks for no absent TPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pals_jax.runtime import accelerators

REPOSITORY = Path(__file__).parents[1]
PARAMS = "params --config=configs/demo.py"
HEAVY = {"sklearn", "scipy", "tensorboardX", "matplotlib", "torch", "tensorflow_datasets"}
LIBRARIES = HEAVY | {"transformers", "orbax", "huggingface_hub"}
CODE = """
import contextlib, io, sys
from pals_jax.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    for command in sys.argv[1:]:
        main(command.split())
print(" ".join({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("commands", "may_not_import"),
    [
        (["--help"], LIBRARIES | {"jax", "flax", "numpy"}),
        (["predict --help"], LIBRARIES | {"jax", "flax", "numpy"}),
        # In one process, for its CPU time; jax.scipy imports scipy.
        (["methods --json", f"{PARAMS} --json", f"{PARAMS} --config.x=1"], LIBRARIES - {"scipy"}),
    ],
    ids=["help", "predict help", "methods, params, a config error"],
)
def test_a_command_imports_no_more_than_it_needs(commands: list, may_not_import: set) -> None:
    command = [sys.executable, "-c", CODE, *commands]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, cwd=REPOSITORY
    )
    assert not set(done.stdout.split()) & may_not_import
    assert ("configuration: \"'x'\"." in done.stderr) == ("x=1" in commands[-1])


def test_what_predicts_imports_nothing_that_only_training_needs(gte_small: Path) -> None:
    """With a tokenizer, for which transformers would import torch where that is installed."""
    code = (
        "import sys, pals_jax.inference.predict, pals_jax.data.tokenize as tokenize;"
        "tokenize.load_tokenizer(sys.argv[1]); print(*{n.split('.')[0] for n in sys.modules})"
    )
    command = [sys.executable, "-c", code, str(gte_small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert not set(done.stdout.split()) & (HEAVY - {"scipy"})


def test_the_package_imports_nothing_before_it_is_asked_to() -> None:
    code = "import sys, pals_jax; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & (LIBRARIES | {"jax", "flax", "numpy", "etils"})


def test_a_run_predicts_without_transformers() -> None:
    """Importing it takes a third of the time of the first answer."""
    code = (
        "import sys, pals_jax; run = pals_jax.load('tests/written_before');"
        "run.predict('red box', task='colour'); print(*{n.split('.')[0] for n in sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert not set(done.stdout.split()) & (LIBRARIES - {"orbax"} | {"pandas"})
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("installed", "chips", "expected"),
    [
        ({"libtpu"}, False, "cpu"),
        ({"libtpu"}, True, None),
        (set(), False, None),
        ({"libtpu", "jax_plugins"}, False, None),
    ],
)
def test_a_tpu_that_is_absent_is_not_looked_for(
    installed: set, chips: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self] if chips else []))
    accelerators.skip_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected
