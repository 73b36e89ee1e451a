"""Runs of encoder-decoders end to end: trained, evaluated, extended, written and refused.

That a run killed and resumed is an unbroken one, and that devices do not matter, is tested together
with encoders: see `test_recovery` and `test_parallel`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import of_pairs
from safetensors.numpy import load_file, save_file
from test_train import arguments, checkpoint, lines

import pals_jax
from pals_jax.cli import main
from pals_jax.data import text_metrics
from pals_jax.inference import text_generation
from pals_jax.inference.generate import generate
from pals_jax.inference.run import Run
from pals_jax.models.task_axis import take
from pals_jax.runtime.errors import UserError

# In 120 steps of both tasks, the loss falls.
LONGER = (
    *("--config.steps_per_epoch=60", "--config.checkpoint_every=30", "--config.groups=4"),
    "--config.optimizer.learning_rate=0.03",
)


@pytest.fixture(scope="module")
def run(pairs_of_module: Path) -> Path:
    """The workdir of a finished run on a frozen Marian, for tests that leave it as it is."""
    workdir = pairs_of_module / "pairs"
    assert main(arguments(pairs_of_module, workdir, *of_pairs(pairs_of_module), *LONGER)) == 0
    return workdir


def losses(run: Run, task: str) -> np.ndarray:
    """The loss of each target of a task's dev set."""
    split = run.experiment.read(run.task(task), "dev", run.tokenizer)
    return run.evaluator.text_losses(run.variables, run.task(task), split)


@pytest.mark.slow
def test_a_run_learns_and_is_evaluated_again(run: Path, capsys: pytest.CaptureFixture) -> None:
    evaluations = [line for line in lines(run) if "score" in line]
    assert [line["step"] for line in evaluations] == [60, 120]
    first, last = (line["upper/dev/loss"] for line in evaluations)
    assert last < first < np.log(Run.load(run).experiment.architecture.vocab_size)  # of guessing
    best = max(evaluations, key=lambda line: line["score"])
    assert best["upper/dev/perplexity"] == pytest.approx(np.exp(best["upper/dev/loss"]))
    scores = [np.exp(-best[f"{task}/dev/loss"]) for task in ("upper", "swap")]
    assert best["score"] == pytest.approx(np.mean(scores))
    assert main(["evaluate", f"--workdir={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sacrebleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    for task, splits in found["results"].items():
        for metric in ("loss", "perplexity"):
            assert splits["dev"].pop(metric) == best[f"{task}/dev/{metric}"]
        assert list(splits["dev"]) == ["rouge1", "rouge2", "rougeL", "bleu"]
    before, log = checkpoint(run), lines(run)
    assert main(arguments(run.parent, run, *of_pairs(run.parent), *LONGER)) == 0
    after = checkpoint(run)
    assert before[0] == after[0]
    assert all(np.array_equal(before[1][key], after[1][key]) for key in before[1])
    assert lines(run) == log


@pytest.mark.slow
@pytest.mark.all_devices
def test_texts_of_both_tasks(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what `generate` writes on one device, in order, and what is scored."""
    monkeypatch.setattr(text_generation, "_WINDOW", 25)  # of 60
    source = run.parent / "swap.jsonl"
    command = ["predict", f"--workdir={run}", "--task=all", f"--input={source}", "--json"]
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    loaded = Run.load(run)
    examples = loaded.experiment.source(loaded.task("swap")).read(loaded.task("swap"), "dev")
    assert [row["lower"] for row in rows] == [text for (text,) in examples.texts]
    tokens = loaded.tokenizer.tokenizer([row["lower"] for row in rows], padding=True)
    variables = jax.tree.map(np.asarray, loaded.variables)
    settings = text_generation.generation_config(loaded.experiment, loaded.tokenizer)
    assert (settings.num_beams, settings.max_length, settings.forced_eos_token_id) == (4, 17, 0)
    for task, name in enumerate(loaded.tasks):
        texts = generate(
            loaded.experiment.model(),
            variables,
            np.array(tokens["input_ids"]),
            np.array(tokens["attention_mask"]),
            task,
            **dataclasses.asdict(settings),
        )
        assert texts.shape == (60, 17)
        found = [row[f"{name}: prediction"] for row in rows]
        assert found == [loaded.tokenizer.text(text) for text in texts.tolist()]
        assert len(set(found)) > 1
        scores = loaded.evaluate()[name]["dev"] if name == "swap" else None
        if scores:
            assert scores["bleu"] == text_metrics.bleu(found, examples.target_texts).score > 0
            rouge = text_metrics.rouge(found, examples.target_texts)
            assert {metric: scores[metric] for metric in rouge} == rouge
    (one,) = loaded.predict("red box", task="swap")
    assert (one.task, one.label, one.value, one.probabilities) == ("swap", None, None, {})
    assert one.columns() == {"prediction": one.text}


@pytest.mark.slow
def test_the_loss_is_that_of_transformers(run: Path, tiny_marian: Path) -> None:
    """Of the model without its adapters, on the tokens that transformers makes of the pairs."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.MarianMTModel.from_pretrained(tiny_marian).eval()
    loaded = Run.load(run)
    bare = loaded.experiment.config.copy_and_resolve_references()
    bare.method = "shared"
    loaded.experiment = type(loaded.experiment)(
        bare, loaded.experiment.tasks, loaded.experiment.architecture
    )
    loaded.evaluator = type(loaded.evaluator)(loaded.experiment, loaded.evaluator.parallel)
    loaded.variables = {"params": loaded.variables["params"], "adapters": {}}
    found = losses(loaded, "swap")
    tokenizer = loaded.tokenizer.tokenizer
    examples = loaded.experiment.source(loaded.task("swap")).read(loaded.task("swap"), "dev")
    for i in (0, 7):
        batch = tokenizer(
            list(examples.texts[i]), text_target=[examples.target_texts[i]], return_tensors="pt"
        )
        with torch.no_grad():
            expected = float(model(**batch).loss) * batch["labels"].shape[1]
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)


@pytest.mark.slow
def test_task_files_go_around(run: Path, capsys: pytest.CaptureFixture) -> None:
    """One out, onto the run's model, and onto the model itself; removed and added again."""
    file, alone = run.parent / "swap.task", run.parent / "alone"
    assert main(["convert", f"--workdir={run}", "--task=swap", f"--out={file}"]) == 0
    whole = Run.load(run)
    expected = {name: losses(whole, name) for name in whole.tasks}
    for base in (run, run.parent / "marian"):
        loaded = pals_jax.load(file, base=base)
        loaded.experiment.config.data.own = whole.experiment.config.data.own
        loaded.experiment.config.data.cache_dir = whole.experiment.config.data.cache_dir
        np.testing.assert_allclose(losses(loaded, "swap"), expected["swap"], rtol=1e-6)
    whole.remove("swap")
    assert list(whole.tasks) == ["upper"]
    whole.add(file)
    whole.experiment.config.data.own = loaded.experiment.config.data.own
    for name in ("upper", "swap"):
        np.testing.assert_allclose(losses(whole, name), expected[name], rtol=1e-5)
    assert main(["convert", f"--workdir={alone}", "--files", str(file), f"--base={run}"]) == 0
    assert Run.load(alone).tasks["swap"] == whole.tasks["swap"]
    tensors, name = load_file(file), "decoder.cross.prefix/layers/keys"
    damaged = run.parent / "damaged.task"
    with_metadata(file, damaged, {k: v for k, v in tensors.items() if "cross" not in k})
    assert main(["convert", f"--workdir={alone}2", "--files", str(damaged), f"--base={run}"]) == 2
    assert "does not fit its method; missing" in capsys.readouterr().err, name


def with_metadata(source: Path, path: Path, tensors: Any, **changes: str) -> None:
    """A task file with other tensors, or with changed metadata."""
    import safetensors

    with safetensors.safe_open(source, "numpy") as file:
        save_file(tensors, path, metadata=file.metadata() | changes)


@pytest.mark.slow
def test_a_task_is_added_without_touching_the_earlier_ones(
    pairs: Path, capsys: pytest.CaptureFixture
) -> None:
    old, new = pairs / "old", pairs / "new"
    once = "--config.epochs=1"
    assert main(arguments(pairs, old, *of_pairs(pairs, "swap"), once)) == 0
    add = arguments(pairs, new, *of_pairs(pairs, "upper"), once, f"--base={old}")
    assert main(add) == 0
    before, after = Run.load(old), Run.load(new)
    assert list(after.tasks) == ["swap", "upper"]
    jax.tree.map(
        np.testing.assert_array_equal, before.variables["params"], after.variables["params"]
    )
    kept = take(after.variables["adapters"], (0, 0), [0])
    jax.tree.map(np.testing.assert_array_equal, kept, dict(before.variables["adapters"]))
    # By another program, with room for two tasks.
    np.testing.assert_allclose(losses(before, "swap"), losses(after, "swap"), rtol=1e-6)
    other = [*add, "--config.data.max_target_length=12"]
    assert main([x.replace(str(new), str(pairs / "x")) for x in other]) == 2
    assert "max_target_length is 12, but 16 in the base run" in capsys.readouterr().err


# Methods, and how many of the encoder's two layers lie below what they change.
BELOW = {
    "lora(rank=2, blocks=('decoder',))": 2,
    "pals(size=6, heads=3, layers=(-1,))": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", BELOW)
def test_a_run_begins_above(
    method: str, pairs: Path, tiny_marian: Path, capsys: pytest.CaptureFixture
) -> None:
    """Cached states of the encoder give the run that computes them; there is no dropout."""
    model = pairs / "without dropout"
    model.mkdir()
    for path in tiny_marian.iterdir():
        if path.name != "config.json":
            (model / path.name).symlink_to(path)
    config = json.loads((tiny_marian / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    given = (*of_pairs(pairs), f"--config.encoder={model}", f"--config.method={method}")
    assert main(arguments(pairs, pairs / "whole", *given)) == 0
    assert main(arguments(pairs, pairs / "above", *given, "--config.lower_dropout=False")) == 0
    said = f"the hidden states of the lowest {BELOW[method]} of 2 layers are computed once"
    assert said in capsys.readouterr().err
    assert len(list((pairs / "cache").glob("*.hidden"))) == 1  # both tasks have the same sources
    (_, ours), (_, theirs) = (checkpoint(pairs / name) for name in ("above", "whole"))
    for key, x in ours.items():
        np.testing.assert_allclose(x, theirs[key], rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_a_merged_task_is_written_for_transformers(
    pairs: Path, capsys: pytest.CaptureFixture
) -> None:
    given = (*of_pairs(pairs), "--config.method=lora(rank=2)", "--config.epochs=1")
    assert main(arguments(pairs, pairs / "run", *given)) == 0
    out = pairs / "merged"
    command = ["convert", f"--workdir={pairs / 'run'}", "--task=swap"]
    assert main([*command, "--to=huggingface", f"--out={out}"]) == 0
    assert "merging changes no logit by more than" in capsys.readouterr().err
    assert (out / "source.spm").exists()
    assert main([*command, "--to=peft", f"--out={pairs / 'peft'}"]) == 0
    with pytest.raises(UserError, match="its files do not name the columns of a task"):
        pals_jax.load(pairs / "peft", base=pairs / "marian")
    assert main([*command, "--to=adapterhub", f"--out={pairs / 'hub'}"]) == 2
    assert "supported on bert, roberta, bart, and this is a marian" in capsys.readouterr().err


OF_MBART = """
import tiny_experiment

def get_config(directory):
    config = tiny_experiment.get_config(directory)
    config.encoder = f"{directory}/mbart"
    config.method = "lora(rank=2)"
    config.trainable = ("adapters/",)
    config.tasks = ("upper", "swap")
    for task, language in (("upper", "ro_RO"), ("swap", "fr_XX")):
        config.data.own[task].source_language = "en_XX"
        config.data.own[task].target_language = language
    config.generation.num_beams = 2
    config.optimizer.learning_rate = 0.03
    return config
"""


@pytest.mark.slow
def test_an_mbart_writes_each_task_in_its_language(
    small: Path, tiny_mbart: Path, capsys: pytest.CaptureFixture
) -> None:
    """Texts start with the language's code, and are those of transformers after merging."""
    transformers = pytest.importorskip("transformers")
    (small / "mbart").symlink_to(tiny_mbart)
    config, workdir = small / "of_mbart.py", small / "run"
    config.write_text(OF_MBART)
    assert main(["train", f"--config={config}:{small}", f"--workdir={workdir}"]) == 0
    run = Run.load(workdir)
    tokenizer = run.tokenizer.tokenizer
    texts = ["red box", "a small old cup", "the hat"]
    source = tokenizer(texts, return_tensors="pt", padding=True)
    for task, language in (("upper", "ro_RO"), ("swap", "fr_XX")):
        command = ["convert", f"--workdir={workdir}", f"--task={task}", "--to=huggingface"]
        assert main([*command, f"--out={small / task}"]) == 0
        model = transformers.MBartForConditionalGeneration.from_pretrained(small / task).eval()
        start = tokenizer.convert_tokens_to_ids(language)
        tokens = model.generate(**source, decoder_start_token_id=start, num_beams=2, max_length=17)
        assert [answer.text for answer in run.predict(texts, task=task)] == [
            run.tokenizer.text(row) for row in tokens.tolist()
        ]
    command = ["predict", f"--workdir={workdir}", f"--input={small / 'swap.jsonl'}", "--task=all"]
    assert main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = [row["lower"] for row in rows]
    assert any(row["upper: prediction"] != row["swap: prediction"] for row in rows)
    for task in ("upper", "swap"):
        alone = [answer.text for answer in run.predict(asked, task=task)]
        assert [row[f"{task}: prediction"] for row in rows] == alone


def test_what_a_run_of_pairs_cannot_do(pairs: Path, capsys: pytest.CaptureFixture) -> None:
    """Each with one sentence, and before anything is written."""
    for overrides, message in (
        (of_pairs(pairs, "swap", "colour"), "task colour is answered with classes"),
        (of_pairs(pairs, "share"), "task share is answered with value"),
        (("--config.tasks=('swap',)",), "task swap is answered with texts, which the encoder"),
        (("--config.label_smoothing=0.1",), "only for the texts of encoder-decoders"),
        ((*of_pairs(pairs), "--config.label_smoothing=1.0"), "it is a share, from 0 to below 1"),
        ((*of_pairs(pairs), "--config.method=pooler()"), "'pooler' has no place in this model"),
        (
            ("--config.method=lora(rank=2, blocks=('decoder',))",),
            "'lora_query' has no place in this model, whose blocks are encoder",
        ),
        (
            (*of_pairs(pairs), "--config.data.max_target_length=33"),
            "data.max_target_length 33 is above the decoder's position table of 32",
        ),
        (
            (*of_pairs(pairs), "--config.data.max_length=33"),
            "data.max_length 33 is above the encoder's position table of 32",
        ),
        (
            (*of_pairs(pairs), "--config.data.max_target_length=1"),
            "a maximum target length of 1 tokens is too small",
        ),
        (
            (*of_pairs(pairs), "--config.generation.max_length=33"),
            "max_length 33 of the generation is above the 32 positions of the decoder",
        ),
        (
            (*of_pairs(pairs), "--config.generation.num_beams=0"),
            "num_beams of the generation must be a whole number from 1, not 0",
        ),
        (
            (*of_pairs(pairs), "--config.generation.min_length=17"),
            "min_length 17 of the generation is not below its max_length 17",
        ),
        (
            (*of_pairs(pairs), "--config.lower_dropout=False"),
            "no layer below its prefix, ffn_adapter that",
        ),
        (
            (*of_pairs(pairs), "--config.data.own.swap.target=reversed"),
            "there is no column 'reversed'; the columns are lower, swapped",
        ),
        (
            (*of_pairs(pairs, "upper"), "--config.data.own.upper.text=a"),
            "there is no column 'a'; the columns are lower, upper",
        ),
    ):
        assert main(arguments(pairs, pairs / "run", *overrides)) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (pairs / "run").exists()


@pytest.mark.slow
def test_what_encoders_alone_can_do(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", f"--workdir={run}", "--ablate"]) == 2
    assert "is an encoder-decoder, whose tasks are answered with" in capsys.readouterr().err
    with pytest.raises(UserError, match="the tasks of this run are answered with texts"):
        Run.load(run).encode("red box", task="swap")


@pytest.mark.nightly
def test_runs_of_one_step(pairs: Path) -> None:
    """Those of a sweep are what each is alone."""
    runs = [
        {"seed": seed, "optimizer.learning_rate": rate} for seed, rate in ((0, 1e-3), (1, 1e-2))
    ]
    command = [*arguments(pairs, pairs / "sweep", *of_pairs(pairs)), "--sweep"]
    assert main([*command, f"--config.sweep={tuple(runs)}"]) == 0
    for run in runs:
        name = f"seed={run['seed']},learning_rate={run['optimizer.learning_rate']}"
        changes = [f"--config.{key}={value}" for key, value in run.items()]
        assert main(arguments(pairs, pairs / name, *of_pairs(pairs), *changes)) == 0
        (_, ours), (_, theirs) = (checkpoint(x / name) for x in (pairs / "sweep", pairs))
        for key, x in ours.items():
            np.testing.assert_allclose(x, theirs[key], rtol=0, atol=1e-5, err_msg=key)
