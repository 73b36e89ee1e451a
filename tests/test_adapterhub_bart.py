"""Adapters of AdapterHub's library on a BART: its outputs and its files (tests/adapterhub_bart)."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from pals_jax.convert import from_adapterhub, from_huggingface, to_adapterhub
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck
from pals_jax.models.adapters.places import within
from pals_jax.models.adapters.spec import Adapter
from pals_jax.runtime.errors import UserError

GOLDEN = Path(__file__).with_name("adapterhub_bart")
BASE = GOLDEN / "base"
# What each of them is in our words.
METHODS: dict[str, Any] = {
    "houlsby": methods.houlsby(size=4, activation="relu", norms=False, init="bert"),
    "pfeiffer": methods.pfeiffer(size=4),
    "mam": methods.prefix_tuning(3, 5) + methods.scaled_parallel(size=4, scale=4.0),
    "lora": methods.lora(2, 4.0, ("query", "value", "ffn_in", "ffn_out")),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(METHODS, "houlsby", "mam"))
def test_logits_and_files(name: str, tmp_path: Path) -> None:
    """Both ways: we compute what the library computes, and write what it writes."""
    model, variables = from_adapterhub(BASE, {"t": GOLDEN / name})
    assert model.method == METHODS[name]
    with np.load(GOLDEN / name / "io.npz") as file:
        io = dict(file)
    ids, mask, targets = io["input_ids"], io["attention_mask"], io["decoder_input_ids"]
    logits = jax.jit(model.apply)(variables, ids, mask, targets, np.ones_like(targets), 0)
    bound = 1e-5 * max(1.0, float(np.abs(io["logits"]).max()))
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=bound)
    to_adapterhub(model, variables, 0, tmp_path / name)
    written, given = (
        (
            json.loads((folder / "adapter_config.json").read_text()),
            safetensors.numpy.load_file(folder / "adapter.safetensors"),
        )
        for folder in (tmp_path / name, GOLDEN / name)
    )
    tiny.assert_same(written[1], given[1])
    assert {k: v for k, v in written[0].items() if k != "config"} == {
        k: v for k, v in given[0].items() if k != "config"
    }
    again, _ = from_adapterhub(BASE, {"t": tmp_path / name})
    assert again.method == model.method


def test_what_the_library_has_not(tmp_path: Path) -> None:
    for method in (
        within(methods.lora(2), blocks=("decoder",)),
        within(methods.prefix_tuning(3, 5), attention=("cross",)),
        (Adapter("a", "attention.projection", Bottleneck(2), "state"),),
        methods.pfeiffer(2) + methods.layer_norms(),
    ):
        model, variables = from_huggingface(BASE, adapters=method)
        with pytest.raises(UserError, match="AdapterHub cannot hold"):
            to_adapterhub(model, variables, 0, tmp_path / "t")
    with pytest.raises(UserError, match="are supported on bert, roberta, bart"):
        to_adapterhub(tiny.seq2seq(model_type="marian"), {}, 0, tmp_path / "t")
    config = json.loads((GOLDEN / "pfeiffer" / "adapter_config.json").read_text())
    config["config"]["leave_out"] = [0]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter.safetensors").symlink_to(GOLDEN / "pfeiffer" / "adapter.safetensors")
    with pytest.raises(UserError, match=r"leave_out=\[0\] is not supported on an encoder-decoder"):
        from_adapterhub(BASE, {"t": tmp_path})
