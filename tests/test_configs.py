"""The configurations of `configs/`: each is complete, and those that can run here do."""

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pals_jax.cli import main
from pals_jax.experiment import config as config_lib
from pals_jax.models.adapters.parse import parse_method

CONFIGS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.py"))


def load(name: str, argument: str = "") -> config_lib.ConfigDict:
    colon = f":{argument}" if argument else ""
    return config_lib.load([f"--config={REPOSITORY / 'configs' / name}{colon}"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_whole(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.tsv").write_text("sentence\tlabel\na\tb\n")
    config = load(name, str(tmp_path) if name == "houlsby_extra.py" else "")
    assert parse_method(config.method)
    for overrides in config.sweep:
        assert all(key.split(".")[0] in config for key in overrides)
    docstring = (REPOSITORY / "configs" / name).read_text()
    assert f"pals-jax train --config=configs/{name}" in docstring


def test_houlsby_on_glue_is_the_papers() -> None:
    config = load("houlsby_glue.py", "rte,256,3e-5")
    assert config.method == "houlsby(size=256)"
    assert config.optimizer.learning_rate == 3e-5
    assert (config.batch_size, config.epochs, config.steps_per_epoch) == (32, 20, 78)
    assert tuple(config.trainable) == ("adapters/",)
    assert len(config.sweep) == 3 * 3 * 2 * 5


@pytest.mark.parametrize("task", ["", "sst2"])
def test_houlsby_fast_has_the_papers_recipe_at_a_larger_batch(task: str) -> None:
    fast, paper = load("houlsby_fast.py", task), load("houlsby_glue.py", task or "mnli")
    assert (fast.encoder, fast.method, fast.tasks) == (paper.encoder, paper.method, paper.tasks)
    larger = fast.batch_size / paper.batch_size
    scaled = paper.optimizer.learning_rate * larger**0.5
    assert fast.optimizer.learning_rate == pytest.approx(scaled, rel=0.01)
    assert fast.steps_per_epoch == pytest.approx(paper.steps_per_epoch / larger, abs=1)


def test_the_unified_view_takes_any_method() -> None:
    config = load("unified_glue.py", "mnli,lora(rank=16, alpha=32.0)")
    assert config.tasks == ("mnli",)
    assert config.method == "lora(rank=16, alpha=32.0)"
    assert [run["seed"] for run in config.sweep] == [42, 2, 4, 6, 8]


SHARES = {  # of BART-large: what a task stores, and the share that the paper and its code state
    "mam(prefix=30, size=512, scale=4.0)": (27_414_528, 6.7),
    "scaled_parallel(size=512)": (25_202_688, 6.2),
    "lora(rank=102, alpha=408.0, targets=('ffn_in', 'ffn_out'))": (25_067_520, 6.2),
    "lora(rank=200, alpha=400.0)": (29_491_200, 7.3),
    "prefix_tuning(length=200, bottleneck=0)": (14_745_600, 3.6),
    "bitfit()": (333_824, 0.1),
}


@pytest.mark.parametrize("method", SHARES)
def test_the_papers_shares_of_bart_large(method: str, capsys: pytest.CaptureFixture) -> None:
    config = REPOSITORY / "configs" / f"unified_xsum.py:{method}"
    assert main(["params", f"--config={config}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored, share = SHARES[method]
    assert (found["encoder"], found["per_task"]) == (406_291_456, stored)
    assert round(100 * stored / found["encoder"], 1) == share


def test_the_shares_of_mbart_large(capsys: pytest.CaptureFixture) -> None:
    """As stated in the configuration; biases are more, because mBART has two more layer norms."""
    lines = (REPOSITORY / "configs" / "unified_enro.py").read_text().splitlines()
    for method, (stored, _) in SHARES.items():
        config = REPOSITORY / "configs" / f"unified_enro.py:{method}"
        assert main(["params", f"--config={config}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        more = 2048 if method == "bitfit()" else 0
        assert (found["encoder"], found["per_task"]) == (610_851_840, stored + more)
        (line,) = (x for x in lines if x.strip().startswith(method.replace("'", '"')))
        (share,) = re.findall(r"([\d.]+)%", line)
        assert float(share) == pytest.approx(
            100 * found["per_task"] / found["encoder"], abs=0.05
        ), method


def test_the_unified_view_writes_as_the_authors_do() -> None:
    summaries = load("unified_xsum.py", "@data")
    assert summaries.data.own.xsum.train == "data/train.jsonl"
    assert summaries.generation.to_dict() == {
        **{"num_beams": 6, "max_length": 60, "min_length": 10},
        **{"length_penalty": 1.0, "no_repeat_ngram_size": 3},
    }
    translations = load("unified_enro.py").generation
    assert (translations.num_beams, translations.max_length) == (5, 150)


@pytest.mark.optimized
def test_the_papers_own_tasks(shared: Path, minilm: Path, tmp_path: Path) -> None:
    """Five of the seventeen extra tasks on a frozen encoder take a few steps together."""
    command = [
        *("train", f"--config={REPOSITORY / 'configs/houlsby_extra.py'}:{shared / 'extra_tasks'}"),
        *(f"--workdir={tmp_path / 'run'}", f"--config.encoder={minilm}"),
        "--config.dtype=float32",  # bfloat16 takes a CPU several times as long
        *(f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.max_length=16"),
        *("--config.epochs=1", "--config.steps_per_epoch=4", "--config.eval_batch_size=256"),
    ]
    assert main(command) == 0
    assert main(["evaluate", f"--workdir={tmp_path / 'run'}", "--json"]) == 0
