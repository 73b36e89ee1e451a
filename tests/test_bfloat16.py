"""bfloat16: parameters, norm statistics, softmax and loss stay float32, and training agrees."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import REPOSITORY

from pals_jax.cli import main
from pals_jax.models.architectures import Model
from pals_jax.models.compute_dtype import in_compute_dtype, only_cast
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.parallel import DataParallel


def test_parameters_and_logits_are_float32_and_the_layers_are_not() -> None:
    model = MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS, tiny.METHODS["pals"], jnp.bfloat16)
    variables = tiny.variables(model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}
    arrays = *tiny.inputs().values(), 1
    hidden = model.apply(variables, *arrays, method="encode")
    assert hidden.dtype == jnp.bfloat16
    assert model.apply(variables, *arrays).dtype == jnp.float32


@pytest.mark.parametrize(
    "model",
    [
        MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS, tiny.METHODS["pals"], jnp.bfloat16),
        tiny.seq2seq(tiny.METHODS["mam"]).clone(dtype=jnp.bfloat16),
    ],
    ids=["encoder", "encoder-decoder"],
)
def test_frozen_weights_held_in_bfloat16_change_no_bit(model: Model) -> None:
    """Of logits and gradients, where the program rounds to bfloat16 as often as it is written."""
    variables = tiny.variables(model)
    arrays = (tiny.texts() if isinstance(model, Seq2SeqModel) else tiny.inputs()).values()

    def bounded(adapters: Any, params: Any) -> Any:
        logits = model.apply({"params": params, "adapters": adapters}, *arrays, 1)
        return jnp.tanh(logits).sum(), logits

    step = jax.jit(
        jax.value_and_grad(bounded, has_aux=True),
        compiler_options={"xla_allow_excess_precision": False},
    )
    held = in_compute_dtype(variables, jnp.bfloat16)
    cast = [x.dtype == jnp.bfloat16 for x in jax.tree.leaves(held)]
    assert sum(cast) == len(jax.tree.leaves(only_cast(variables, jnp.bfloat16))) > 10
    tiny.assert_same(held["adapters"], variables["adapters"])
    expected = step(variables["adapters"], variables["params"])
    tiny.assert_same(step(variables["adapters"], held["params"]), expected)


@pytest.mark.parametrize("num_devices", [1, pytest.param(2, marks=pytest.mark.all_devices)])
@pytest.mark.optimized
def test_two_hundred_steps_of_a_real_task(
    num_devices: int, shared: Path, minilm: Path, tmp_path: Path
) -> None:
    """MRPC from the real encoder: the curves of both dtypes stay together, and so do the scores.

    On two devices, gradients are exchanged in the dtype of the computation.
    """
    assert num_devices == DataParallel.over().shards.total
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
