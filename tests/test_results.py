"""The claims file, the runner of what decides them, the statistics and the pages."""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import CONFIG

from pals_jax.data import metrics, text_metrics
from pals_jax.experiment.experiment import Experiment
from pals_jax.runtime.errors import UserError
from results import bundle, claims, jobs, records, report, runs
from results.jobs import Campaign, Job
from results.statistics import Difference, Side, difference, verdict

SMALL = """
format = 1
config = "CONFIG"

[device.cpu]
alone = { epochs = 1, steps_per_epoch = 4, "optimizer.learning_rate" = 0.01 }
together = { epochs = 2, steps_per_epoch = 2 }

[arm.majority]
kind = "majority"

[arm.logistic-mean]
kind = "logistic-mean"
title = "logistic regression"

[arm.lhuc]
method = "lhuc"
trainable = ["adapters/"]

[arm.lhuc-upper]
kind = "without"
of = "lhuc"
layers = [0]

[arm.lhuc-spans]
kind = "spans"
method = "lhuc"
trainable = ["adapters/"]

[arm.together]
method = "shared"
together = true

[arm.added]
kind = "added"
method = "lhuc"
trainable = ["adapters/"]

[[claim]]
name = "X1"
paper = "houlsby"
sentence = "One thing is above another."
source = "section 1"
published = "2 against 1"
pairs = [["lhuc", "majority"]]
shown = ["logistic-mean", "lhuc-upper", "lhuc-spans"]
tasks = ["colour"]
seeds = [0, 1]
picture = "heat map"

[[claim]]
name = "X2"
paper = "pals"
sentence = "Together is better."
source = "section 2"
published = "no figure"
pairs = [["together", "majority"]]
shown = ["added"]
tasks = ["colour", "share"]
seeds = [0]
"""


@pytest.fixture(scope="module")
def small_claims(tmp_path_factory: pytest.TempPathFactory) -> claims.Claims:
    file = tmp_path_factory.mktemp("claims") / "claims.toml"
    file.write_text(SMALL.replace("CONFIG", str(CONFIG)))
    return claims.read(file)


def runner_of(small: Path, small_claims: claims.Claims, pages: str = "pages") -> runs.Runner:
    return runs.Runner(Campaign(small_claims, "cpu", small, small / pages), small / "work")


@pytest.mark.slow
def test_what_is_missing_is_run_and_reported(
    small_of_module: Path,
    small_claims: claims.Claims,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once; a record that is lost is run again, and gives the same answers and pages."""
    runner = runner_of(small_of_module, small_claims)
    pages, chosen = runner.campaign.pages, small_claims.only("")
    runs.run(runner, chosen, hours=1.0)
    files = sorted((small_of_module / "pages" / "runs").rglob("*.json"))
    assert len(files) == 2 * 2 + 1 + 2 * 2 + 2  # two arms, two seeds; baselines; tasks in one run
    assert not list((small_of_module / "work").rglob("checkpoints"))
    report.write(small_claims, pages)
    page = (pages / "houlsby.md").read_text()
    assert "logistic regression" in page
    assert "runs are missing" not in page
    assert "![X1](X1.png)" in page
    assert "while later tasks were added: 0\n" in (pages / "pals.md").read_text()
    assert (pages / "X1.png").read_bytes().startswith(b"\x89PNG")

    drawn, upper = (
        json.loads((pages / "runs" / "cpu" / arm / "colour" / "0.json").read_text())
        for arm in ("lhuc-spans", "lhuc-upper")
    )
    (task,) = chosen[0].tasks
    dev = records.decode_all({task: records.read(records.dev_file(task, pages))["answers"]})
    with_all, without = (
        np.mean(records.decode_all(each["answers"])[task]["dev"] == dev[task]["dev"])
        for each in (drawn, upper)
    )
    assert drawn[records.ABLATION][task][0][0] == pytest.approx(without - with_all)
    assert drawn[records.ABLATION][task][1][0] is None

    lost = pages / "runs" / "cpu" / "lhuc" / "colour" / "1.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    (job,) = runner.campaign.missing(chosen[0], chosen[0].arms)
    assert job.seeds == (1,)
    with runner.held(job) as free:
        assert free
        runs.run(runner, chosen, hours=1.0)  # as another process would
    assert not lost.exists()
    report.write(small_claims, pages)
    assert "runs are missing" in (pages / "houlsby.md").read_text()
    runs.run(runner, chosen, hours=1.0)
    again = json.loads(lost.read_text())
    assert again["answers"] == before["answers"]
    report.write(small_claims, pages)
    assert (pages / "houlsby.md").read_text() == page
    capsys.readouterr()
    runs.run(runner, chosen, hours=1.0)
    assert "job" not in capsys.readouterr().err

    other = tmp_path / "claims.toml"
    other.write_text(SMALL.replace("CONFIG", str(CONFIG)).replace("0.01", "0.02"))
    with pytest.raises(UserError, match=r"is of a run with the settings .*remove the file"):
        report.write(claims.read(other), pages)
    assert (pages / "houlsby.md").read_text() == page


# ---------------------------------------------------------------- the claims themselves


def test_every_arm_is_a_configuration(shared: Path) -> None:
    """Of every claim's tasks, on every device."""
    listed = claims.read()
    assert {claim.paper for claim in listed.claims.values()} == set(claims.PAPERS)
    for device in listed.devices:
        campaign = Campaign(listed, device, shared)
        for name, arm in listed.arms.items():
            users = [claim for claim in listed.claims.values() if name in claim.arms]
            assert users, f"no claim uses {name}"
            tasks = users[0].runs_of(arm)[0]
            Experiment.from_config(campaign.config(Job(arm, tasks, (0,)), 0))


@pytest.mark.slow
def test_the_pages_are_those_of_the_records(tmp_path: Path) -> None:
    """And of nothing else."""
    for folder in ("runs", "dev"):
        if (records.PAGES / folder).exists():
            shutil.copytree(records.PAGES / folder, tmp_path / folder)
    listed = claims.read()
    report.write(listed, tmp_path)
    for claim in listed.claims.values():
        _, said = report.judge(report.evidence_of(listed, claim, tmp_path), claim)
        assert said != "does not hold" or claim.found, f"{claim.name}: say what was found out"
    made = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert made == {path.name for path in records.PAGES.iterdir() if path.is_file()}
    for page in sorted(name for name in made if name.endswith(".md")):
        assert (tmp_path / page).read_text() == (records.PAGES / page).read_text(), page


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('config = "CONFIG"', "", "names no config"),
        ("format = 1", "format = 2", "has the format 2, not 1"),
        ("format = 1", "format =", "cannot be read as a list of claims"),
        ('["lhuc", "majority"]', '["lhuc", "nothing"]', "compares 'nothing', which is no arm"),
        ('source = "section 1"', "", "X1 has no source"),
        ('source = "section 1"', 'sauce = "1"', "X1 has sauce, which no claim has"),
        ('paper = "houlsby"', 'paper = "mine"', "an unknown paper, 'mine'"),
        ('kind = "majority"', 'kind = "minority"', "an unknown kind, 'minority'"),
        ('picture = "heat map"', 'picture = "photo"', "X1 has an unknown picture, 'photo'"),
        ('picture = "heat map"', "", "needs one arm of the kind 'spans' if its picture is a heat"),
        ('of = "lhuc"', 'of = "lost"', "lhuc-upper is of 'lost' without the layers"),
        ("layers = [0]", "", r"lhuc-upper is of 'lhuc' without the layers \(\); name"),
        ('name = "X2"', 'name = "X1"', "has two claims of one name"),
        ('[["lhuc", "majority"]]', '[["lhuc"]]', r"X1 compares \[\['lhuc'\]\]; give pairs"),
        ("together = { epochs", "twogether = { epochs", "has the length 'together', which device"),
    ],
)
def test_claims_that_are_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "claims.toml"
    file.write_text(SMALL.replace(old, new))
    with pytest.raises(UserError, match=message):
        claims.read(file)


def test_a_claim_that_does_not_exist(small_claims: claims.Claims) -> None:
    with pytest.raises(UserError, match=r"no claim 'X3' .* its claims are X1, X2"):
        small_claims.only("X1,X3")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ('{"format": 0}', "has the format 0, not 1")]
)
def test_records_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "0.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        records.read(file)


# ---------------------------------------------------------------- bundles


def test_parts_have_the_stated_size(tmp_path: Path) -> None:
    content = bytes(range(250))
    with io.BufferedWriter(bundle.Parts(tmp_path, 100), 64) as writer:
        writer.write(content)
    parts = sorted(tmp_path.iterdir())
    assert [(part.name, part.stat().st_size) for part in parts] == [
        ("part.000", 100),
        ("part.001", 100),
        ("part.002", 50),
    ]
    assert b"".join(part.read_bytes() for part in parts) == content


def test_bundles_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "glue").mkdir()
    with pytest.raises(UserError, match="there is no folder extra_tasks in"):
        bundle.make(tmp_path, tmp_path / "out", "cpu", 1)
    for folder in jobs.DATA[1:]:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="parts of 0 bytes hold nothing"):
        bundle.make(tmp_path, tmp_path / "out", "cpu", 0)
    with pytest.raises(UserError, match="glue is there already"):
        bundle.make(tmp_path, tmp_path / "glue", "cpu", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_a_bundle_runs_where_there_is_no_network(shared: Path, tmp_path: Path) -> None:
    bundle.make(shared, tmp_path / "parts", "cpu", 60 * 2**20)
    assert max(part.stat().st_size for part in (tmp_path / "parts").iterdir()) == 60 * 2**20
    script = "cat parts/part.* | tar -x && rm -r parts && exec bash claims/run --only=H4 --plan"
    env = os.environ | {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "H4" in ran.stderr.split("what is missing, at ")[1]


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("values", [np.array([0, 2, 1]), np.array([0.25, 0.5], np.float32)])
def test_answers_as_text(values: np.ndarray) -> None:
    np.testing.assert_array_equal(records.decode(records.encode(values)), values)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson"])
def test_scores_are_those_of_the_metrics(metric: str) -> None:
    rng = np.random.default_rng(0)
    answers, truth = rng.integers(0, 2, (2, 3, 50)).astype(np.float32)
    if metric == "pearson":
        answers = answers + rng.random(answers.shape)
    expected = [100 * metrics.compute([metric], row, truth[0])[metric] for row in answers]
    np.testing.assert_allclose(Side(answers, truth[0], metric).scores(), expected, rtol=1e-6)


def test_an_interval_covers_and_is_the_same_each_time() -> None:
    """Right on 80% and on 70% of the examples: nearly every draw's interval has 10 in it."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(5):
        truth = np.zeros(400)
        better, worse = ((rng.random((3, 400)) > p).astype(float) for p in (0.8, 0.7))
        sides = [Side(1 - x, truth + 1, "accuracy") for x in (better, worse)]
        found = difference(sides[:1], sides[1:], 3, False)
        covered += found.low <= 10.0 <= found.high
    assert covered >= 4
    assert difference(sides[:1], sides[1:], 3, False) == found


def test_an_interval_covers_with_few_seeds() -> None:
    """Seeds alone make a difference, of 3 to 5 points: without widening, 67% would be covered."""
    rng, covered = np.random.default_rng(0), 0
    example = np.arange(100)
    for _ in range(40):
        right = np.clip(np.rint(rng.normal(70, 4, (2, 3, 1))), 0, 100)
        one, other = (
            Side((example < of_seeds) + 0, example * 0 + 1, "accuracy") for of_seeds in right
        )
        found = difference([one], [other], 3, False)
        covered += found.low <= 0.0 <= found.high
    assert covered >= 36


@pytest.mark.parametrize(
    ("margin", "intervals", "expected"),
    [
        (0.0, [(1, 3)], "holds"),
        (0.0, [(-1, 3)], "not decided here"),
        (0.0, [(-3, -1)], "does not hold"),
        (0.0, [(0, 0)], "not decided here"),
        (1.0, [(-3, -1)], "not decided here"),
        (1.0, [(-0.5, 3)], "holds"),
        (0.0, [(1, 3), None], "not decided here"),
        (0.0, [None, (-3, -1)], "does not hold"),
        (0.0, [(1, 3), (-1, 2)], "not decided here"),
    ],
)
def test_verdicts(
    small_claims: claims.Claims, margin: float, intervals: list[Any], expected: str
) -> None:
    fields = vars(small_claims.claims["X1"]) | {"margin": margin}
    found = [each and Difference(0.0, *map(float, each)) for each in intervals]
    assert verdict(claims.Claim(**fields), found) == expected
    assert verdict(claims.Claim(**fields), found, moved=0.5) == "does not hold"


# ---------------------------------------------------------------- texts

TRANSLATION = """
format = 1
config = "CONFIG"

[device.cpu]
translation = { epochs = 1, steps_per_epoch = 4 }

[arm.untouched]
kind = "untouched"

[arm.full]
method = "shared"
trainable = ["params/"]
length = "translation"

[arm.lora]
method = "lora(rank=2)"
trainable = ["adapters/"]
length = "translation"

[[claim]]
name = "X3"
paper = "unified"
sentence = "One translates as well as the other."
source = "section 3"
published = "1.0 against 1.0"
pairs = [["lora", "full"]]
shown = ["untouched"]
tasks = ["swap"]
seeds = [0]
"""


OF_PAIRS = """
import tiny_experiment

def get_config(directory):
    config = tiny_experiment.get_config(directory)
    config.encoder = f"{directory}/marian"
    config.method = "shared"
    config.generation.num_beams = 1
    return config
"""


@pytest.mark.slow
def test_translations_are_compared(pairs_of_module: Path, tmp_path: Path) -> None:
    """By BLEU; French is what the model writes without adapters, and stays as it was."""
    config, file = tmp_path / "config.py", tmp_path / "claims.toml"
    config.write_text(OF_PAIRS)
    file.write_text(TRANSLATION.replace("CONFIG", str(config)))
    listed = claims.read(file)
    campaign = Campaign(listed, "cpu", pairs_of_module, tmp_path / "pages")
    runs.run(runs.Runner(campaign, tmp_path / "work"), listed.only(""), hours=1.0)
    found = {
        name: records.read(campaign.record(name, ("swap",), 0))
        for name in ("untouched", "full", "lora")
    }
    texts = {name: records.decode(x["answers"]["swap"]["dev"]) for name, x in found.items()}
    assert texts["lora"].shape == (60,)
    truth = records.decode(records.read(records.dev_file("swap", campaign.pages))["answers"]["dev"])
    side = Side.of_texts(texts["lora"][None], truth)
    expected = text_metrics.bleu(texts["lora"].tolist(), truth.tolist()).score
    assert side.score() == pytest.approx(100 * expected)
    report.write(listed, campaign.pages)
    page = (campaign.pages / "unified.md").read_text()
    assert "| `lora(rank=2)` |" in page
    assert "runs are missing" not in page


def test_bleu_of_a_resample_is_that_of_its_texts() -> None:
    rng = np.random.default_rng(0)
    words = np.array(["a", "the", "red", "box", "cup", "is", "on", "under"])
    texts, truth = (np.array([" ".join(rng.choice(words, 7)) for _ in range(20)]) for _ in range(2))
    chosen = rng.integers(0, 20, 20)
    expected = text_metrics.bleu(texts[chosen].tolist(), truth[chosen].tolist()).score
    found = Side.of_texts(texts[None], truth).score(examples=chosen)
    assert found == pytest.approx(100 * expected)
    np.testing.assert_array_equal(records.decode(records.encode(texts)), texts)
