"""The Python API: a run from any place, its answers, more tasks and fewer, and what is refused."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from conftest import WORDS
from test_written_before import COLOUR, SAME, WRITTEN

import pals_jax
from pals_jax import Run, Task, UserError
from pals_jax.cli import main
from pals_jax.data.examples import Examples
from pals_jax.data.tokenize import SavedTokenizer, TextEncoder, load_tokenizer

PAIRS = list(SAME)


@pytest.fixture(scope="module")
def run() -> Run:
    """The run of the previous release: colour takes a sentence, same and share take a pair."""
    return pals_jax.load(WRITTEN)


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """The traces and compilations within the context."""
    events: list[str] = []
    recording = True

    def record(event: str, _: float, **kwargs: Any) -> None:
        if recording and "/compile/" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)
    yield events
    recording = False


# ------------------------------------------------ answers


def test_a_text_a_list_a_pair_and_pairs(run):
    for text, (label, probability) in COLOUR.items():
        (row,) = run.predict(text, task="colour")
        assert (row.texts, row.task, row.label, row.value) == (
            *({"sentence": text}, "colour"),
            *(label, None),
        )
        assert row.probabilities["red"] == pytest.approx(probability, abs=1e-6)
        assert sum(row.probabilities.values()) == pytest.approx(1.0)
    rows = run.predict(iter(COLOUR), task="colour")
    assert [row.texts["sentence"] for row in rows] == list(COLOUR)
    assert run.predict(PAIRS[0], task="same")[0] == run.predict(PAIRS, task="same")[0]
    for row, probability in zip(run.predict(PAIRS, task="same"), SAME.values(), strict=True):
        assert row.probabilities["yes"] == pytest.approx(probability, abs=1e-6)
    (row,) = run.predict(PAIRS[0], task="share")
    assert (row.label, row.probabilities) == (None, {})
    assert 0.0 <= row.value <= 2.0


def test_all_tasks_that_a_text_fits(run):
    rows = run.predict(PAIRS, task="all")
    assert (len(rows), rows.tasks) == (4, ("same", "share"))
    alone = {name: run.predict(PAIRS, task=name) for name in rows.tasks}
    for i, row in enumerate(rows):
        expected = alone[row.task][i // 2]
        assert row.texts == expected.texts
        assert row.value == pytest.approx(expected.value, abs=1e-5)
        assert row.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert [row.task for row in run.predict("red box", task="all")] == ["colour"]


def test_the_command_line_gives_the_same(run, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"a": a, "b": b}) for a, b in PAIRS))
    predict = ["predict", f"--workdir={WRITTEN}", "--task=all", f"--input={tmp_path / 'x.jsonl'}"]
    assert main([*predict, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = run.predict(PAIRS, task="all")
    for i, line in enumerate(lines):
        same, share = rows[2 * i : 2 * i + 2]
        assert line["same: prediction"] == same.label
        assert line["same: p(yes)"] == same.probabilities["yes"]
        assert line["share: prediction"] == share.value


def test_many_texts_of_all_lengths_are_as_in_evaluation(run):
    """In the order given, whatever rows they share."""
    rng = np.random.default_rng(0)
    texts = [(" ".join(rng.choice(WORDS, n)),) for n in rng.integers(1, 30, 200)]
    split = run.text_encoder(Examples(texts, None))
    logits = run.evaluator.logits(run.variables, run.task("colour"), split)
    for count in (1, 3, 20, 200):
        few = run.text_encoder(Examples(texts[:count], None))
        (answers,) = run.evaluator.answers(run.variables, [run.task("colour")], few)
        tiny.assert_rounded_alike(answers, logits[:count])


@pytest.mark.slow
@pytest.mark.all_devices
def test_all_devices_give_the_same(run):
    spread = pals_jax.load(WRITTEN)
    assert len(spread.evaluator.parallel.devices) == 8
    assert_alike(spread.predict(PAIRS, task="all"), run.predict(PAIRS, task="all"))
    np.testing.assert_allclose(
        spread.encode(PAIRS, task="same"), run.encode(PAIRS, task="same"), atol=1e-5
    )


def test_vectors_are_what_the_head_reads(run):
    vectors = run.encode(PAIRS, task="same")
    assert vectors.shape == (2, 24)
    assert vectors.dtype == np.float32
    head = jax.tree.map(lambda x: np.asarray(x)[1], run.variables["adapters"]["head"])
    logits = (vectors @ head["kernel"] + head["bias"])[:, :3]
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = run.predict(PAIRS, task="same")
    np.testing.assert_allclose(shares, [list(x.probabilities.values()) for x in rows], atol=1e-5)


def test_repeated_calls_compile_nothing(run):
    """Few shapes, and every task and number of texts has one of them."""
    sizes, long = (1, 2, 7, 16, 50), " ".join(WORDS)

    def every_call(word: str) -> None:
        for size in sizes:
            run.predict([f"{word} box"] * size, task="colour")
            run.predict([(word, long)] * size, task="same")
            run.predict([(word, long)] * size, task="all")
            run.encode([word] * size, task="colour")

    with compiled() as first:
        every_call("red")
    with compiled() as again:
        every_call("blue")
        run.predict(("green", long), task="share")
        run.encode(("green", long), task="share")
    assert len(first) > 0
    assert again == []


def test_a_data_frame(run):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(PAIRS, columns=["a", "b"], index=["x", "y"])
    rows = run.predict(frame, task="same")
    assert list(rows) == list(run.predict(PAIRS, task="same"))
    table = rows.to_pandas()
    assert list(table.columns) == ["a", "b", "task", "label", "p(maybe)", "p(no)", "p(yes)"]
    assert list(table.index) == ["x", "y"]
    table = run.predict(frame.assign(other=1), task="all").to_pandas()
    assert list(table.task) == ["same", "share"] * 2
    assert list(table.index) == ["x", "x", "y", "y"]
    assert np.isnan(table.value.iloc[0])
    with pytest.raises(UserError, match="the data frame, line 2: the text in column 'b' is not a"):
        run.predict(frame.assign(b=["x", np.nan]), task="same")
    with pytest.raises(UserError, match="there is no column 'sentence'"):
        run.predict(frame, task="colour")
    with pytest.raises(UserError, match="several kinds of tasks"):
        run.predict(frame.assign(sentence="x"), task="all")
    with pytest.raises(UserError, match="no text to answer"):
        run.predict(frame[:0], task="same")


# ------------------------------------------------ more tasks, and fewer


def test_tasks_come_and_go_and_the_others_stay(tmp_path, capsys):
    run = pals_jax.load(WRITTEN)
    before = {name: run.predict(PAIRS, task=name) for name in ("same", "share")}
    colour = run.predict(list(COLOUR), task="colour")
    run.remove("same")
    assert list(run.tasks) == ["colour", "share"]
    run.add(WRITTEN / "same.task")
    assert list(run.tasks) == ["colour", "share", "same"]
    run.save(tmp_path / "new")
    saved = pals_jax.load(tmp_path / "new")
    tiny.assert_same(saved.variables, run.variables)
    assert_alike(saved.predict(list(COLOUR), task="colour"), colour)
    for name, rows in before.items():
        assert_alike(saved.predict(PAIRS, task=name), rows)
    assert main(["predict", f"--workdir={tmp_path / 'new'}", "--task=other"]) == 2
    assert "its tasks are colour, share, same" in capsys.readouterr().err
    with pytest.raises(UserError, match="a task 'same', which the run has already"):
        run.add(WRITTEN / "same.task")
    with pytest.raises(UserError, match="holds a run already"):
        run.save(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run to"):
        run.save(tmp_path / "file" / "run")
    run.remove("colour")
    run.remove("share")
    with pytest.raises(UserError, match="same is the run's only task"):
        run.remove("same")


def assert_alike(actual: Any, desired: Any) -> None:
    for one, other in zip(actual, desired, strict=True):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
        assert one.value == pytest.approx(other.value, abs=1e-6)


def test_a_task_file_with_its_base():
    run = pals_jax.load(WRITTEN / "same.task", base=WRITTEN)
    for row, probability in zip(run.predict(PAIRS), SAME.values(), strict=True):
        assert row.probabilities["yes"] == pytest.approx(probability, abs=1e-6)


def spoilt(path: Path, change: Any) -> Path:
    """A copy of the task file with other tensors or metadata."""
    with safetensors.safe_open(WRITTEN / "same.task", "numpy") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name).copy() for name in names}
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors["head/bias"].put(0, np.nan), "not finite, in head/bias"),
        (lambda tensors, _: tensors.update(more=np.zeros(3)), "unknown or of a wrong shape: more"),
        (lambda _, metadata: metadata.update(base="0" * 64), "was trained on another base"),
        (lambda _, metadata: metadata.update(max_length="many"), "metadata of .* are damaged"),
        (lambda _, metadata: metadata.update(task='{"name": 3}'), "metadata of .* are damaged"),
        (lambda _, metadata: metadata.update(task="[]"), "metadata of .* are damaged"),
        (lambda _, metadata: metadata.update(method="lora(rank=2)"), "not fit its method"),
        (lambda _, metadata: metadata.update(format="other"), "not a task file"),
    ],
)
def test_a_task_file_that_is_refused(run, tmp_path, change, message):
    path = spoilt(tmp_path / "new.task", change)
    with pytest.raises(UserError, match=message):
        run.add(path)
    assert len(run.tasks) == 3


# ------------------------------------------------ what is refused


def test_places_that_hold_nothing(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "both").mkdir()
    shutil.copy(WRITTEN / "experiment.json", tmp_path / "both")
    (tmp_path / "both" / "pals_config.json").write_text('{"hidden_size_aug": 6}')
    for place, options, message in (
        (tmp_path / "both", {}, "several formats, run and bert_n_pals; name one with format="),
        (tmp_path, {}, r"holds nothing to load; it needs the files of one of run, task, "),
        (tmp_path / "text", {}, "holds nothing to load"),
        (tmp_path / "none", {}, r'there is no .*none; .* format="huggingface"'),
        ("x" * 300, {}, "cannot look into x"),
        (".", {}, "holds nothing to load"),
        ("http://x", {}, "neither a directory nor gs://"),
        (WRITTEN, {"format": "keras"}, "no format 'keras'; formats are run, task, adapterhub"),
        (WRITTEN, {"tasks": [Task("x", ())]}, "says itself what its tasks are"),
        (WRITTEN / "same.task", {}, r"\(task\) lacks the encoder; name .* with base="),
        (WRITTEN / "same.task", {"base": tmp_path}, "config.json"),
        (tmp_path, {"format": "run"}, "is not the workdir of a run"),
        (tmp_path, {"format": "peft", "base": WRITTEN}, "is a run; name the encoder itself"),
        (tmp_path, {"format": "peft", "base": tmp_path}, "config.json"),
        (WRITTEN, {"base": tmp_path}, "is a run, which has its own encoder"),
        (tmp_path, {"format": "bert_n_pals"}, "has no tensor file"),
        (tmp_path, {"format": "tf_bert"}, "cannot read the TensorFlow checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            pals_jax.load(place, **options)


def test_texts_that_are_refused(run):
    for texts, task, message in (
        ([], "colour", "there is no text to answer"),
        (["red", 3], "colour", "text 2 is 3, of type int; give a str, or a pair"),
        (None, "colour", "text 1 is None, of type NoneType"),
        (b"red", "colour", "of type bytes"),
        ({"sentence": "red"}, "colour", "of type dict"),
        ([float("nan")], "colour", "text 1 is nan"),
        (("red", "box"), "colour", "text 1: the number of texts is 2; task colour needs 1: sent"),
        (["red", ("red", "box")], "colour", "text 2: the number of texts is 2"),
        ("red", "same", "task same needs 2 as a tuple: a, b"),
        (("a", "b", "c"), "all", "fits no task of the run; the tasks need colour: sentence; same"),
        ("\ud83d", "colour", "text 1 is not valid Unicode"),
        ("red", "colours", "no task 'colours'; its tasks are colour, same, share"),
        ("red", None, "has several tasks; choose one of colour, same, share"),
    ):
        with pytest.raises(UserError, match=message):
            run.predict(texts, task=task)
    with pytest.raises(UserError, match="call encode with one task at a time"):
        run.encode("red", task="all")


def test_a_text_of_a_million_characters(run):
    """Is truncated, as in training."""
    long, short = run.predict(["red box " * 125_000, "red box " * 100], task="colour")
    assert long.probabilities == short.probabilities


def test_a_workdir_that_vanishes(tmp_path):
    """A loaded run is in memory, and still answers."""
    shutil.copytree(WRITTEN, tmp_path / "run")
    run = pals_jax.load(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    for text, (label, _) in COLOUR.items():
        assert run.predict(text, task="colour")[0].label == label
    with pytest.raises(UserError, match=r"there is no .*run"):
        pals_jax.load(tmp_path / "run")


def test_a_saved_tokenizer_is_the_one_of_transformers(tiny_encoder, tiny_roberta, tmp_path):
    texts = [("red  Box!",), ("a [SEP] b",), ("x" * 300,), ("ü", "the ball")]
    for number, directory in enumerate((tiny_encoder, tiny_roberta)):
        theirs = load_tokenizer(directory)
        theirs.save_pretrained(tmp_path / str(number))
        ours = SavedTokenizer.read(tmp_path / str(number))
        assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        assert len(ours) == len(theirs)
        ours.save_pretrained(tmp_path / "again")
        one, other = (TextEncoder(x, 16)(Examples(texts, None)) for x in (ours, theirs))
        np.testing.assert_array_equal(one.tokens, other.tokens)
        again = load_tokenizer(tmp_path / "again")
        assert again.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        shutil.rmtree(tmp_path / "again")
    with pytest.raises(UserError, match="no usable tokenizer"):
        SavedTokenizer.read(tmp_path)


def test_the_public_names():
    assert set(pals_jax.__all__) == {"Run", "Task", "UserError", "load"}
    for name in pals_jax.__all__:
        assert getattr(pals_jax, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pals_jax.nothing
