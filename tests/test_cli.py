"""The command line: help, counts, and invalid inputs, each with one sentence and status 2."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.numpy

from pals_jax.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = Path(__file__).with_name("tiny_experiment.py")
PALS_GLUE = REPOSITORY / "configs" / "pals_glue.py"


def refused(capsys, arguments: list[str], *parts: str) -> str:
    """The one sentence on stderr, which holds `parts`; stdout stays empty."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith("pals-jax: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in sentence
    return sentence


def train_refused(capsys, small: Path, overrides: list[str], *parts: str) -> None:
    """`train` is refused, and leaves no workdir behind."""
    workdir = small / "refused"
    command = ["train", f"--config={CONFIG}:{small}", f"--workdir={workdir}", *overrides]
    refused(capsys, command, *parts)
    assert not workdir.exists()


@pytest.mark.parametrize("command", ["", "train", "evaluate", "predict", "params"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    assert "usage: pals-jax" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["params", "--config=x", "--foo"], ["evaluate", "--config.a=1"]],
)
def test_unknown_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "pals-jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "per_task", "multiple"),
    [
        ("pals(size=204)", 1_819_836, 1.13),
        ('pals(size=276,layers="final_half")', 1_801_116, 1.13),
        ('pals(size=276,layers="first_half")', 1_801_116, 1.13),
        ("pals(size=84,shared=False)", 1_815_552, 1.13),
        ("low_rank(size=100)", 1_853_616, 1.13),
        ("shared", 0, 1.0),
    ],
)
def test_params_gives_the_published_counts(method, per_task, multiple, capsys):
    assert main(["params", f"--config={PALS_GLUE}:{method}", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["encoder"] == 109_482_240
    assert counts["per_task"] == per_task
    assert counts["tasks"] == 8
    # Published with two decimals; 1.1354 for low-rank is printed as 1.13.
    assert int(100 * counts["multiple"]) / 100 == multiple
    assert sum(counts["heads"]) == 769 * (6 * 2 + 3 + 1)  # MNLI has three classes, STS-B a number
    assert counts["total"] == counts["encoder"] + 8 * per_task + sum(counts["heads"])


def test_params_as_a_table(capsys):
    assert main(["params", f"--config={PALS_GLUE}"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "1,819,836" in err
    assert "1.1330x" in err


def test_wrong_configurations(small, capsys):
    for overrides, parts in [
        (["--config.epoch=3"], ["epoch", "Did you mean"]),
        (["--config.optimizer.lr=3"], ["lr"]),
        (["--config.epochs=many"], ["config.epochs"]),
        (["--config.epochs=0"], ["epochs is 0"]),
        (["--config.groups=3"], ["batch_size 8", "groups 3"]),
        (["--config.dtype=float64"], ["float64", "bfloat16"]),
        (["--config.tasks=('colour','colour')"], ["repeats"]),
        (["--config.tasks=('colours',)"], ["colours"]),
        (["--config.tasks=('mrpcc',)"], ["mrpcc", "mrpc"]),
        (["--config.method=palz(size=3)"], ["palz", "low_rank"]),
        (["--config.method=pals(size=10,heads=3)"], ["10", "3 heads"]),
        (["--config.method=pals(size=12,heads=3,layers=[5])"], ["0 to 1"]),
        (["--config.sampling=anealed"], ["anealed", "annealed"]),
        (["--config.optimizer.name=adam"], ["adam", "bert_n_pals"]),
        (["--config.optimizer.schedule=cosine"], ["cosine", "linear"]),
        (["--config.trainable=('adaptors/',)"], ["adaptors/"]),
        (["--config.trainable=('adapters(',)"], ["adapters(", "not a regular expression"]),
        (["--config.seed=-1"], ["seed is -1"]),
        (["--config.optimizer.warmup=10."], ["warmup is 10.0"]),
        (["--config.data.own.share.metrics=('accuracy',)"], ["share", "accuracy", "regression"]),
        (["--config.data.own.same.metrics=('f1',)"], ["same", "f1"]),
        (["--config.data.own.same.metrics=('recall',)"], ["same", "recall", "spearman"]),
        (["--config.encoder=/nowhere/at/all"], ["/nowhere/at/all", "hub"]),
        (["--config.data.max_length=33"], ["33", "position table of 32"]),
        (["--config.data.max_length=2"], ["2"]),
        (["--config.data.source=glue", "--config.tasks=('mrpc',)"], ["glue", "glue_dir"]),
    ]:
        train_refused(capsys, small, overrides, *parts)
    workdir = f"--workdir={small / 'refused'}"
    refused(capsys, ["train", "--config=/nowhere.py", workdir], "/nowhere.py")
    broken = small / "broken.py"
    broken.write_text(
        "from pals_jax.config import default\n\n\ndef get_config():\n"
        "    config = default()\n    config.bach_size = 3\n    return config\n"
    )
    refused(capsys, ["train", f"--config={broken}", workdir], "bach_size")
    broken.write_text("import nothing_of_that_name\n")
    refused(capsys, ["train", f"--config={broken}", workdir], "nothing_of_that_name")
    broken.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    return ConfigDict({'seed': 0})\n"
    )
    refused(capsys, ["train", f"--config={broken}", workdir], "missing", "optimizer.b1")


def test_wrong_arguments(small, capsys):
    run = f"--workdir={small / 'run'}"
    both = "--input requires --task, and --fill-missing requires --submission"
    refused(capsys, ["predict", run, "--task=colour", "--fill-missing"], both)
    refused(capsys, ["predict", run, f"--submission={small}", f"--input={small}"], both)
    for name, known in (("unified_glue", "mnli, sst2"), ("houlsby_glue", "cola, sst2")):
        config = REPOSITORY / "configs" / f"{name}.py"
        refused(capsys, ["params", f"--config={config}:mrcp"], f"'mrcp' is not one of {known}")
    for where in ("localhost --processes=2 --process=0", "localhost:1 --processes=2 --process=2"):
        command = ["train", f"--config={CONFIG}:{small}", run, *f"--coordinator={where}".split()]
        refused(capsys, command, "is not HOST:PORT, or --process=")
    for price in ("nan", "-5", "much"):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", f"--config={CONFIG}:{small}", "--topology=v3-8", f"--price={price}"])
        assert f"{price} is not a price" in capsys.readouterr().err


def test_wrong_data(small, capsys):
    colour = small / "colour.tsv"
    good = colour.read_text()
    for text, parts in [
        (None, ["colour.tsv"]),
        ("", ["colour.tsv", "empty"]),
        ("sentence\tlabel\n", ["colour.tsv", "no rows"]),
        (good.replace("sentence\t", "text\t", 1), ["colour.tsv", "'sentence'", "text, label"]),
        (good + "a ball\tgreen\n", ["colour.tsv, line 62", "'green'", "red, blue"]),
        (good + "a ball\tred\tbox\n", ["colour.tsv, line 62", "2 columns expected, 3 found"]),
        (good + "a ball\n", ["colour.tsv, line 62", "1 found"]),
    ]:
        colour.unlink()
        if text is not None:
            colour.write_text(text)
        train_refused(capsys, small, [], *parts)
        colour.write_text(good)
    (small / "same.jsonl").write_text('{"a": 1\n')
    train_refused(capsys, small, [], "same.jsonl, line 1", "JSON")


def test_vocabulary_larger_than_the_embedding(small, capsys):
    encoder = small / "small"
    shutil.copytree((small / "encoder").resolve(), encoder)
    tensors = safetensors.numpy.load_file(encoder / "model.safetensors")
    words = "embeddings.word_embeddings.weight"
    tensors[words] = tensors[words][:-3].copy()
    safetensors.numpy.save_file(tensors, encoder / "model.safetensors")
    config = json.loads((encoder / "config.json").read_text())
    config["vocab_size"] -= 3
    (encoder / "config.json").write_text(json.dumps(config))
    tokens, rows = config["vocab_size"] + 3, config["vocab_size"]
    override = [f"--config.encoder={encoder}"]
    train_refused(capsys, small, override, f"{tokens} tokens", f"only {rows}")


def test_damaged_weights(small, capsys):
    encoder = small / "damaged"
    shutil.copytree((small / "encoder").resolve(), encoder)
    weights = encoder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    train_refused(capsys, small, [f"--config.encoder={encoder}"], "model.safetensors")


def test_workdir_that_cannot_be_written(small, capsys):
    (small / "file").write_text("in the way")
    command = ["train", f"--config={CONFIG}:{small}", f"--workdir={small / 'file' / 'run'}"]
    refused(capsys, command, str(small / "file" / "run"), "cannot read or write")


@pytest.mark.slow
def test_checkpoints_that_are_missing_damaged_or_of_another_config(small, capsys):
    workdir = small / "run"
    command = ["train", f"--config={CONFIG}:{small}", f"--workdir={workdir}"]
    evaluate = ["evaluate", f"--workdir={workdir}"]
    refused(capsys, evaluate, "not the workdir of a run")
    same = [*command, "--config.epochs=1", "--config.steps_per_epoch=5"]
    same += ["--config.checkpoint_every=5"]  # one alone, so that no other takes its place
    assert main(same) == 0

    refused(capsys, command, "another experiment", "config.epochs", "config.steps_per_epoch")
    predict = ["predict", f"--workdir={workdir}", "--task"]
    refused(capsys, [*predict, "colours"], "colours", "colour, same, share")
    missing = f"--input={small / 'nothing.tsv'}"
    refused(capsys, [*predict, "colour", missing], "nothing.tsv")
    submission = small / "submission"
    refused(capsys, ["predict", f"--workdir={workdir}", f"--submission={submission}"], "CoLA.tsv")
    assert not submission.exists()

    def files(folder: str) -> list[Path]:
        return [path for path in (workdir / folder).rglob("*") if path.is_file()]

    # Truncated: the largest files of both checkpoints lose their ends.
    for folder in ("checkpoints", "best"):
        largest = max(files(folder), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    refused(capsys, evaluate, "damaged", "step 5", "best")
    refused(capsys, same, "damaged", "step 5", "checkpoints")

    # Empty directories.
    shutil.rmtree(workdir / "best")
    (workdir / "best").mkdir()
    refused(capsys, evaluate, "holds no checkpoint")
    (workdir / "experiment.json").write_text("{")
    for command_ in (evaluate, same):
        refused(capsys, command_, "experiment.json is damaged")


@pytest.mark.slow
def test_stdin_that_does_not_fit(small, capsys, monkeypatch):
    workdir = small / "run"
    overrides = ["--config.epochs=1", "--config.steps_per_epoch=2"]
    assert main(["train", f"--config={CONFIG}:{small}", f"--workdir={workdir}", *overrides]) == 0
    for text, parts in [
        ("", ["stdin has no examples"]),
        ("one text\n", ["line 1", "needs 2", "a, b"]),
        ('a\tb\n{"a": "x"}\n', ["line 2", "b"]),
        ('{"a": \n', ["line 1", "JSON"]),
        ('{"a": 1, "b": "x"}\n', ["line 1", "not a string"]),
        ("{}\n", ["line 1", "'a'"]),
    ]:
        monkeypatch.setattr("sys.stdin", iter(text.splitlines(keepends=True)))
        refused(capsys, ["predict", f"--workdir={workdir}", "--task=same"], *parts)
    for line in (b"caf\xe9\tcoffee\n", b'{"a": "caf\xe9", "b": "x"}\n'):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\tb\n" + line)))
        refused(
            capsys, ["predict", f"--workdir={workdir}", "--task=same"], "line 2", "not valid UTF-8"
        )
    for text, parts in [
        ("one\ttwo\tthree\n", ["fits no task", "colour: sentence; same: a, b"]),
        ('{"sentence": "x", "a": "x", "b": "y"}\n', ["several kinds", "sentence or a, b"]),
    ]:
        monkeypatch.setattr("sys.stdin", iter([text]))
        refused(capsys, ["predict", f"--workdir={workdir}", "--task=all"], *parts)


def test_a_workdir_below_home(small, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(small))
    refused(capsys, ["evaluate", "--workdir=~/nowhere"], f"{small}/nowhere is not the workdir")


def test_messages_are_one_line(small, capsys):
    sentence = refused(
        capsys,
        ["train", f"--config={CONFIG}:{small}", "--workdir=/tmp/x", "--config.a.b=1"],
    )
    assert re.fullmatch(r"pals-jax: .+[.?]", sentence)
