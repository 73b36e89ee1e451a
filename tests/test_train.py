"""Training end to end: through the command line, killed and resumed, evaluated and used."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tiny
from etils import epath

from pals_jax.cli import main
from pals_jax.convert import huggingface
from pals_jax.data.batches import Layout
from pals_jax.data.sampler import Sampler
from pals_jax.experiment import workdir
from pals_jax.experiment.checkpoint import best_predictions
from pals_jax.experiment.config import load
from pals_jax.inference.run import Run
from pals_jax.models.task_axis import take
from pals_jax.runtime import distributed, storage
from pals_jax.runtime.errors import UserError
from pals_jax.training.train import train

CONFIG = Path(__file__).with_name("tiny_experiment.py")


def arguments(small: Path, workdir: Path, *overrides: str) -> list[str]:
    return ["train", f"--config={CONFIG}:{small}", f"--workdir={workdir}", *overrides]


def checkpoint(workdir: Path, folder: str = "checkpoints") -> tuple[int, dict]:
    """The newest checkpoint as it lies on disk: its step and its leaves by path."""
    manager = ocp.CheckpointManager(storage.absolute(workdir / folder))
    step = manager.latest_step()
    tree = manager.restore(step, args=ocp.args.StandardRestore())
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# In 120 steps a task is learnt.
LONGER = ("--config.steps_per_epoch=60", "--config.checkpoint_every=30")


@pytest.fixture(scope="module")
def run(small_of_module: Path) -> Path:
    """The workdir of a finished run, for all tests that leave it as it is."""
    workdir = small_of_module / "run"
    assert main(arguments(small_of_module, workdir, *LONGER)) == 0
    return workdir


def test_a_run_learns_and_leaves_everything(run):
    evaluations = [line for line in lines(run) if "score" in line]
    assert [line["step"] for line in evaluations] == [60, 120]
    assert max(line["colour/dev/accuracy"] for line in evaluations) > 0.75  # majority: 0.5
    assert [line["step"] for line in lines(run)] == sorted(line["step"] for line in lines(run))
    assert {"examples_per_second", "learning_rate", "grad_norm"} <= set(lines(run)[0])
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "tokenizer" / "tokenizer.json").exists()
    step, state = checkpoint(run)
    assert step == 120
    assert state["['step']"] == 120


def test_evaluate_gives_the_best_score_again(run, capsys):
    writing = run / "best" / "999.orbax-checkpoint-tmp"  # as does a run that goes on
    writing.mkdir()
    assert main(["evaluate", f"--workdir={run}", "--json"]) == 0
    writing.rmdir()
    out = json.loads(capsys.readouterr().out)
    best = max((line for line in lines(run) if "score" in line), key=lambda line: line["score"])
    assert out["step"] == best["step"]
    for task, splits in out["results"].items():
        for split, metrics in splits.items():
            for metric, value in metrics.items():
                assert value == best[f"{task}/{split}/{metric}"]
    assert main(["evaluate", f"--workdir={run}"]) == 0
    assert "colour" in capsys.readouterr().err


def test_the_best_checkpoint_holds_its_predictions(run):
    """Those of the dev examples, as they are computed again."""
    kept, loaded = best_predictions(epath.Path(run)), Run.load(epath.Path(run))
    assert {task: list(splits) for task, splits in kept.items()} == {
        task: ["dev"] for task in ("colour", "share", "same")
    }
    tasks = loaded.experiment.tasks
    splits = {task.name: loaded.experiment.read_eval(task, loaded.tokenizer) for task in tasks}
    again = loaded.evaluator.predict(loaded.variables, splits)
    jax.tree.map(np.testing.assert_array_equal, again, kept)


def test_predict_a_file_and_stdin(run, capsys, monkeypatch):
    source = run.parent / "colour.tsv"
    assert main(["predict", f"--workdir={run}", "--task=colour", f"--input={source}"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["sentence", "prediction", "p(red)", "p(blue)"]
    assert len(rows) == 61
    for _, prediction, red, blue in rows[1:]:
        assert prediction == ("red" if float(red) > float(blue) else "blue")
        assert float(red) + float(blue) == pytest.approx(1.0, abs=2e-4)

    text = 'the dark box\tdark box\n{"a": "the dark box", "b": "dark box"}\n'
    for task in ("same", "share"):
        monkeypatch.setattr("sys.stdin", iter(text.splitlines(keepends=True)))
        assert main(["predict", f"--workdir={run}", f"--task={task}", "--json"]) == 0
        first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert first == second
        if task == "same":
            assert first["prediction"] in {"yes", "no", "maybe"}
            assert sum(first[f"p({name})"] for name in ("yes", "no", "maybe")) == pytest.approx(1)
        else:
            assert 0.0 <= first["prediction"] <= 2.0


def test_predict_every_task_that_a_text_fits(run, capsys, monkeypatch):
    """With the answers that each of them gives alone."""

    def predict(task: str, text: str) -> dict:
        monkeypatch.setattr("sys.stdin", iter([text]))
        assert main(["predict", f"--workdir={run}", f"--task={task}", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    for pair in ("the dark box\tdark box\n", '{"a": "the dark box", "b": "dark box"}\n'):
        together, same, share = (predict(task, pair) for task in ("all", "same", "share"))
        assert together.pop("a") == "the dark box"
        assert together.pop("b") == "dark box"
        for name, answer in (("same", same), ("share", share)):
            for key in answer.keys() - {"a", "b"}:
                assert together.pop(f"{name}: {key}") == pytest.approx(answer[key], abs=1e-5)
        assert not together
    assert predict("all", "a red ball\n") == predict("colour", "a red ball\n")


def test_running_it_again_changes_nothing(run):
    before, log = checkpoint(run), lines(run)
    assert main(arguments(run.parent, run, *LONGER)) == 0
    after = checkpoint(run)
    assert before[0] == after[0]
    assert all(np.array_equal(before[1][key], after[1][key]) for key in before[1])
    assert lines(run) == log


@pytest.mark.slow
def test_one_compilation_serves_all_tasks(small, caplog):
    config = load([f"--config={CONFIG}:{small}", "--config.sampling=round_robin"])
    config.steps_per_epoch = 12
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax._src.interpreters.pxla"):
        train(config, small / "run")
    messages = [record.getMessage() for record in caplog.records]
    # Eight rows on one device; evaluation has sixteen.
    shapes = [re.search(r"int32\[1,8,(\d+)\]", message) for message in messages]
    lengths = [shape.group(1) for shape in shapes if shape]
    # 24 steps of three tasks in turn: one compilation for each padded length, none for a task.
    assert 1 <= len(lengths) == len(set(lengths)) <= 4


@pytest.mark.slow
def test_an_encoder_from_the_hub_in_the_old_names(small, tiny_encoder, monkeypatch):
    """bert-base-uncased has nested names, gamma and beta, and pre-training heads."""
    hub = small / "hub"
    shutil.copytree(tiny_encoder, hub)
    tensors = safetensors.numpy.load_file(hub / "model.safetensors")
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in tensors.items()
    }
    old["cls.predictions.bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(old, hub / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(hub)
    )
    overrides = ("--config.encoder=someone/some-bert", "--config.epochs=1")
    assert main(arguments(small, small / "run", *overrides, "--config.steps_per_epoch=2")) == 0
    assert set(asked) == {"someone/some-bert"}
    assert main(["evaluate", f"--workdir={small / 'run'}", "--json"]) == 0


@pytest.mark.slow
def test_a_roberta(small, tiny_roberta, capsys):
    def run(length: int) -> int:
        overrides = ("--config.method=shared", "--config.tasks=('colour',)", *LONGER)
        length_override = f"--config.data.max_length={length}"
        encoder = f"--config.encoder={tiny_roberta}"
        return main(arguments(small, small / "run", encoder, length_override, *overrides))

    assert run(33) == 2  # two of the 34 rows of its position table serve padding
    assert "above the encoder's position table of 32" in capsys.readouterr().err
    assert run(32) == 0
    assert max(line.get("colour/dev/accuracy", 0) for line in lines(small / "run")) > 0.75
    assert workdir.load(small / "run").layout == Layout(pad_id=1, token_types=1)
    assert main(["evaluate", f"--workdir={small / 'run'}", "--json"]) == 0


@pytest.mark.slow
def test_divergence_is_said(small, capsys):
    """With the step, the task and the examples, so that one can look at them."""
    workdir = small / "run"
    overrides = ("--config.optimizer.learning_rate=1e30", "--config.groups=2")
    assert main(arguments(small, workdir, *overrides)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    step = int(re.search(r"diverged: in step (\d+) the loss is", message).group(1))
    assert 2 <= step <= 4
    config = load([f"--config={CONFIG}:{small}", *overrides])
    sampler = Sampler((60, 60, 60), "annealed", 0, 2, config.steps_per_epoch, 2, 4)
    for task, examples in zip(*sampler.draw(step - 1), strict=True):
        assert f"{config.tasks[task]}: {', '.join(map(str, examples))}" in message
    assert list((workdir / "best").glob("[0-9]*")) == []


@pytest.mark.slow
def test_data_may_move_between_two_starts(small, capsys):
    run = small / "run"
    assert main(arguments(small, run)) == 0
    (small / "colour.tsv").rename(small / "moved.tsv")
    assert main(["evaluate", f"--workdir={run}"]) == 2
    assert "colour.tsv" in capsys.readouterr().err
    moved = [f"--config.data.own.colour.{x}={small / 'moved.tsv'}" for x in ("train", "dev")]
    assert main(arguments(small, run, *moved)) == 0
    assert main(["evaluate", f"--workdir={run}"]) == 0


@pytest.mark.slow
def test_frozen_encoder_and_mixed_batches(small, monkeypatch):
    """In bfloat16, stopped and resumed; on disk its weights are those that it began with."""
    overrides = ("--config.trainable=('adapters/',)", "--config.groups=4", "--config.epochs=1")
    overrides = (*overrides, "--config.dtype=bfloat16")
    assert main(arguments(small, small / "run", *overrides)) == 0
    _, state = checkpoint(small / "run")
    begun = huggingface.load_variables(workdir.load(small / "run").model(), small / "encoder", 0)
    for folder, at in (("checkpoints", "['frozen']"), ("best", "")):
        _, saved = checkpoint(small / "run", folder)
        for path, x in jax.tree.leaves_with_path({"params": begun["params"]}):
            kept = saved[at + jax.tree_util.keystr(path)]
            assert kept.dtype == np.float32
            np.testing.assert_array_equal(kept, x)

    monkeypatch.setattr(distributed.Preemption, "reached", lambda self, step: step == 2)
    assert main(arguments(small, small / "broken", *overrides)) == 143
    monkeypatch.undo()
    assert main(arguments(small, small / "broken", *overrides)) == 0
    tiny.assert_same(checkpoint(small / "broken"), checkpoint(small / "run"))
    moments = [key for key in state if "opt_state" in key and "embeddings" in key]
    assert moments == []
    assert any("opt_state" in key and "pal" in key for key in state)
    assert any("frozen" in key and "embeddings" in key for key in state)


# Tasks added to a run, and tasks alone

FROZEN = ("--config.trainable=('adapters/',)", "--config.epochs=1")


@pytest.mark.slow
def test_a_task_is_added_without_touching_the_earlier_ones(small):
    """Parameters, logits and optimiser state of the earlier tasks: the same, bit for bit."""
    method = "--config.method=houlsby(size=6)"
    old, new = small / "old", small / "new"
    assert main(arguments(small, old, method, "--config.tasks=('colour','share')", *FROZEN)) == 0
    add = arguments(small, new, method, "--config.tasks=('same',)", *FROZEN, f"--base={old}")
    assert main(add) == 0

    before, after = Run.load(old), Run.load(new)
    assert [task.name for task in after.experiment.tasks] == ["colour", "share", "same"]
    jax.tree.map(
        np.testing.assert_array_equal, before.variables["params"], after.variables["params"]
    )
    kept = take(after.variables["adapters"], after.experiment.model().num_outputs, [0, 1])
    jax.tree.map(np.testing.assert_array_equal, kept, dict(before.variables["adapters"]))
    for name in ("colour", "share"):
        logits = [
            run.evaluator.logits(
                run.variables,
                run.task(name),
                run.experiment.read(run.task(name), "dev", run.tokenizer),
            )
            for run in (before, after)
        ]
        np.testing.assert_array_equal(*logits)
    _, state = checkpoint(new)
    moments = [x for path, x in state.items() if "opt_state" in path and x.shape[:1] == (3,)]
    assert len(moments) > 10
    for leaf in moments:  # of the tasks that were not drawn: as they were made
        assert not leaf[:2].any()
    assert any(leaf[2].any() for leaf in moments)
    # It is a run like any other: all its tasks can be evaluated and predicted.
    assert set(after.evaluate()) == {"colour", "share", "same"}
    assert main(add) == 0


def test_a_run_goes_on_with_the_examples_it_began_with(run):
    """Other data would give it the draws of another run."""
    experiment = workdir.load(run)
    sizes = json.loads((run / "experiment.json").read_text())["train_examples"]
    assert len(sizes) == len(experiment.trained) == 3
    workdir.refuse_other_sizes(experiment, run, sizes)
    workdir.refuse_other_sizes(experiment, run / "new", sizes)
    name = experiment.trained[1].name
    more = f"started with {sizes[1]} training examples of {name}, and there are {sizes[1] + 1} now"
    with pytest.raises(UserError, match=more):
        workdir.refuse_other_sizes(experiment, run, [sizes[0], sizes[1] + 1, sizes[2]])


@pytest.mark.slow
def test_what_a_base_refuses(small, capsys):
    old = small / "old"
    assert main(arguments(small, old, "--config.tasks=('colour',)", *FROZEN)) == 0
    add = [f"--base={old}", "--config.tasks=('same',)"]
    for changes, message in (
        (add, "the encoder must stay frozen"),
        ([*add, "--config.trainable=('adapters/|params/',)"], "must stay frozen"),
        ([*add, FROZEN[0], "--config.dtype=bfloat16"], "dtype is bfloat16"),
        ([*add, FROZEN[0], "--config.data.max_length=8"], "data.max_length is 8"),
        ([*add, FROZEN[0], "--config.method=shared"], "all tasks of a model share a method"),
        ([f"--base={old}", "--config.tasks=('colour',)", FROZEN[0]], "already has a task 'colour'"),
        ([*add, FROZEN[0], f"--base={small}"], "not the workdir of a run"),
    ):
        assert main(arguments(small, small / "new", *changes)) == 2
        assert message in capsys.readouterr().err
    assert not (small / "new").exists()


def test_tasks_can_be_removed_and_reordered(run):
    """Each keeps its logits, from another program with a narrower head, so but for rounding."""
    loaded = Run.load(run)
    model, variables = loaded.experiment.model(), loaded.variables
    assert model.num_outputs == (2, 3, 1)
    rows = take(variables["adapters"], model.num_outputs, [2, 0])
    with pytest.raises(UserError, match="task id 3 is out of range"):
        take(variables["adapters"], model.num_outputs, [3])
    fewer = model.clone(num_outputs=(1, 2))
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    arrays = ids, np.zeros_like(ids), np.ones_like(ids)
    for new, old in ((0, 2), (1, 0)):
        was = jax.jit(model.apply)(variables, *arrays, old)
        now = jax.jit(fewer.apply)({**variables, "adapters": rows}, *arrays, new)
        tiny.assert_rounded_alike(now, was[:, :2])


@pytest.mark.slow
def test_each_task_alone(small, capsys):
    two = "--config.tasks=('colour','share')"
    assert main(arguments(small, small / "alone", "--separate", two, *FROZEN[1:])) == 0
    for name in ("colour", "share"):
        alone = Run.load(small / "alone" / name)
        assert [task.name for task in alone.experiment.tasks] == [name]
    results = json.loads((small / "alone" / "results.json").read_text())
    assert results.keys() == {"colour", "share"}
    assert main(arguments(small, small / "x", "--separate", "--config.tasks=('same','nope')")) == 2
    assert not (small / "x").exists()
    table = capsys.readouterr().err.split("dev scores")[3]
    assert all(name in table for name in ("colour", "share"))


@pytest.mark.slow
def test_ablation(small, capsys):
    """The heat map: nothing below the diagonal, and the sum of all layers at its far corner."""
    run = small / "run"
    assert main(arguments(small, run, "--config.method=houlsby(size=6)", *LONGER)) == 0
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={run}", "--ablate", "--json"]) == 0
    changes = {k: np.array(v, float) for k, v in json.loads(capsys.readouterr().out).items()}
    assert changes.keys() == {"colour", "same", "share"}
    for change in changes.values():
        np.testing.assert_array_equal(np.isnan(change), [[False, False], [True, False]])
    assert any(change[0, 1] != 0 for change in changes.values())
    assert (run / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ablation_of_what_carries_nothing(small, capsys):
    run = small / "run"
    assert main(arguments(small, run, "--config.method=shared", *FROZEN[1:])) == 0
    assert main(["evaluate", f"--workdir={run}", "--ablate"]) == 2
    assert "carry no adapters" in capsys.readouterr().err
