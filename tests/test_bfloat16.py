"""bfloat16: parameters, norm statistics, softmax and loss stay float32, and training agrees."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import REPOSITORY

from pals_jax.cli import main
from pals_jax.models.multitask import MultiTaskModel


def test_parameters_and_logits_are_float32_and_the_layers_are_not() -> None:
    model = MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS, tiny.METHODS["pals"], jnp.bfloat16)
    variables = tiny.variables(model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}
    arrays = *tiny.inputs().values(), 1
    hidden = model.apply(variables, *arrays, method="encode")
    assert hidden.dtype == jnp.bfloat16
    assert model.apply(variables, *arrays).dtype == jnp.float32


@pytest.mark.optimized
def test_two_hundred_steps_of_a_real_task(shared: Path, minilm: Path, tmp_path: Path) -> None:
    """MRPC from the real encoder: the curves of both dtypes stay together, and so do the scores."""
    curves, scores = {}, {}
    for dtype in ("float32", "bfloat16"):
        workdir = tmp_path / dtype
        command = [
            *("train", f"--config={REPOSITORY / 'configs/small_glue.py'}", f"--workdir={workdir}"),
            *(f"--config.dtype={dtype}", f"--config.encoder={minilm}", "--config.tasks=('mrpc',)"),
            *(f"--config.data.dir={shared / 'glue'}", f"--config.data.cache_dir={tmp_path / 'c'}"),
            *("--config.data.max_length=32", "--config.batch_size=8", "--config.epochs=1"),
        ]
        assert main(command) == 0
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        curves[dtype] = np.array([line["loss"] for line in lines if "loss" in line])
        scores[dtype] = lines[-1]["mrpc/dev/accuracy"]
    assert len(curves["float32"]) == 20  # means of ten steps
    drift = np.abs(curves["bfloat16"] - curves["float32"])
    print(f"largest drift of the loss {drift.max():.4f}, mean {drift.mean():.4f}; scores {scores}")
    assert drift.mean() < 0.005
    assert drift.max() < 0.02
    assert abs(scores["bfloat16"] - scores["float32"]) < 0.03
