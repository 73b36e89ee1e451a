"""Tasks as files: exported from a run, put back onto a base, and converted to other formats."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
import transformers

from pals_jax.cli import main
from pals_jax.inference.run import Run
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.parse import parse_method

CONFIG = Path(__file__).with_name("tiny_experiment.py")
SETTINGS = ("--config.trainable=('adapters/',)", "--config.epochs=1", "--config.steps_per_epoch=6")
LORA = "--config.method=lora(rank=2, targets=('query', 'ffn_out'))"


def train(small: Path, name: str, *overrides: str) -> Path:
    config = f"--config={CONFIG}:{small}"
    assert main(["train", config, f"--workdir={small / name}", *SETTINGS, *overrides]) == 0
    return small / name


def convert(run: Path, task: str, out: Path, to: str = "task") -> int:
    return main(["convert", f"--workdir={run}", f"--task={task}", f"--to={to}", f"--out={out}"])


def assemble(workdir: Path, base: Path, *files: Path) -> int:
    names = [str(file) for file in files]
    return main(["convert", f"--workdir={workdir}", f"--base={base}", "--files", *names])


def dev_logits(run: Run, name: str, experiment) -> np.ndarray:
    split = experiment.read(run.task(name), "dev", run.tokenizer)
    return run.evaluator.logits(run.variables, run.task(name), split)


@pytest.fixture(scope="module")
def run(small_of_module: Path) -> Path:
    return train(small_of_module, "run", LORA)


def test_tasks_as_files_and_back(small, run, capsys):
    """Any set of them, in any order, onto the encoder: each answers as before."""
    for name in ("colour", "same", "share"):
        assert convert(run, name, small / f"{name}.safetensors") == 0
    files = [small / "share.safetensors", small / "same.safetensors"]
    assert assemble(small / "new", small / "encoder", *files) == 0

    old, new = Run.load(run), Run.load(small / "new")
    assert [task.name for task in new.experiment.tasks] == ["share", "same"]
    for name in ("share", "same"):
        expected = dev_logits(old, name, old.experiment)
        # Its batches are of another size, which may change the last bit.
        actual = dev_logits(new, name, old.experiment)
        tiny.assert_rounded_alike(actual, expected)
    (small / "texts.jsonl").write_text('{"a": "red box", "b": "red box"}\n')
    predict = ["predict", f"--workdir={small / 'new'}", "--task=same", "--json"]
    capsys.readouterr()
    assert main([*predict, f"--input={small / 'texts.jsonl'}"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] in ("yes", "no", "maybe")
    assert main(["evaluate", f"--workdir={small / 'new'}"]) == 2
    assert "made from task files can only predict" in capsys.readouterr().err
    # Where the data of some are known, these are evaluated.
    with new.experiment.config.unlocked():
        new.experiment.config.data.own.share = old.experiment.config.data.own.share
    assert set(new.evaluate()) == {"share"}
    assert "they came as files without data, or without a head: same" in capsys.readouterr().err
    # A run is a base too.
    assert assemble(small / "newer", run, small / "colour.safetensors") == 0


def test_a_task_file_holds_the_task_and_nothing_else(small, run):
    """The size that the papers promise: the parameters of one task, in float32."""
    path = small / "same.safetensors"
    assert convert(run, "same", path) == 0
    tensors = safetensors.numpy.load_file(path)
    lora = 2 * (2 * (24 + 24) + 2 * (40 + 24))  # two layers, two projections, rank 2
    assert sum(x.size for x in tensors.values()) == lora + 3 * 25
    assert all(x.dtype == np.float32 for x in tensors.values())
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["task"])["labels"] == ["maybe", "no", "yes"]
    assert json.loads(metadata["task"])["metrics"] == ["accuracy"]
    assert parse_method(metadata["method"]) == methods.lora(rank=2, targets=("query", "ffn_out"))
    assert len(metadata["base"]) == len(metadata["tokenizer"]) == 64


@pytest.mark.slow
def test_a_prefix_is_saved_flat(small):
    """Without the network behind it, as the paper counts it: 2 l d in each of two layers."""
    run = train(small, "run", "--config.method=prefix_tuning(length=3, bottleneck=7) + pooler")
    path = small / "colour.safetensors"
    assert convert(run, "colour", path) == 0
    assert sum(x.size for x in safetensors.numpy.load_file(path).values()) == (
        2 * 2 * 3 * 24 + (24 + 1) * 24 + (24 + 1) * 2
    )
    assert assemble(small / "new", small / "encoder", path) == 0
    old, new = Run.load(run), Run.load(small / "new")
    expected = dev_logits(old, "colour", old.experiment)
    actual = dev_logits(new, "colour", old.experiment)
    tiny.assert_rounded_alike(actual, expected)


@pytest.mark.slow
def test_task_files_that_do_not_fit(small, run, capsys):
    colour, other = small / "colour.safetensors", small / "other.safetensors"
    assert convert(run, "colour", colour) == 0
    assert convert(train(small, "run2"), "same", other) == 0

    weights = small / "weights"
    shutil.copytree((small / "encoder").resolve(), weights)
    tensors = safetensors.numpy.load_file(weights / "model.safetensors")
    tensors["pooler.dense.bias"] = tensors["pooler.dense.bias"] + 1
    safetensors.numpy.save_file(tensors, weights / "model.safetensors")
    words = small / "words"
    shutil.copytree((small / "encoder").resolve(), words)
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    part = small / "part.safetensors"
    with safetensors.safe_open(colour, "numpy") as file:
        head = {"head/bias": file.get_tensor("head/bias")}
        safetensors.numpy.save_file(head, part, file.metadata())
    damaged = small / "damaged.safetensors"
    damaged.write_bytes(colour.read_bytes()[:200])

    base = small / "encoder"
    for files, onto, message in (
        ([colour], weights, "was trained on another base"),
        ([colour], words, "was trained on another tokenizer"),
        ([colour, other], base, "other.safetensors has another method (pal) than"),
        ([colour, colour], base, "two files hold a task named 'colour'"),
        ([part], base, "does not fit its method; missing, unknown or of a wrong shape"),
        ([damaged], base, "cannot read the task file"),
        ([small / "nothing"], base, "cannot read the task file"),
        ([weights / "model.safetensors"], base, "is not a task file"),
    ):
        assert assemble(small / "new", onto, *files) == 2
        assert message in capsys.readouterr().err
        assert not (small / "new").exists()
    assert assemble(run, base, colour) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.slow
def test_for_transformers_with_lora_merged(small, run, capsys):
    out = small / "out"
    assert convert(run, "same", out, "huggingface") == 0
    change = float(capsys.readouterr().err.split("by more than ")[1].split()[0])
    assert change < 1e-5
    loaded = Run.load(run)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = [("red box", "the red cup"), ("a pen", "a pen")]
    inputs = tokenizer([a for a, _ in texts], [b for _, b in texts], padding=True)
    arrays = [np.array(inputs[name], np.int32) for name in ("input_ids", "token_type_ids")]
    arrays.append(np.array(inputs["attention_mask"], np.int32))
    ours = jax.jit(loaded.experiment.model().apply)(loaded.variables, *arrays, 1)
    theirs = model(**{k: v.long() for k, v in inputs.convert_to_tensors("pt").items()}).logits
    np.testing.assert_allclose(ours[:, :3], theirs.detach().numpy(), rtol=0, atol=1e-5)
    assert model.config.id2label == {0: "maybe", 1: "no", 2: "yes"}


@pytest.mark.slow
def test_for_other_libraries(small, run):
    assert convert(run, "colour", small / "peft", "peft") == 0
    assert json.loads((small / "peft" / "adapter_config.json").read_text())["r"] == 2
    pfeiffer = train(small, "pfeiffer", "--config.method=pfeiffer(size=4)")
    assert convert(pfeiffer, "colour", small / "hub", "adapterhub") == 0
    assert (small / "hub" / "adapter_config.json").exists()


@pytest.mark.slow
def test_convert_refuses(small, run, capsys):
    workdir, out = f"--workdir={run}", f"--out={small / 'out'}"
    for arguments, message in (
        (["--task=colours", out], "no task 'colours'"),
        (["--task=colour", out, "--to=keras"], "no format 'keras'; formats are task, hugg"),
        (["--task=colour", f"--out={small}"], "exists; choose another place"),
        (["--task=colour"], "convert needs --task and --out"),
        (["--files", "x.safetensors"], "convert needs --task and --out"),
    ):
        assert main(["convert", workdir, *arguments]) == 2
        assert message in capsys.readouterr().err
    pals = train(small, "pals")
    assert convert(pals, "colour", small / "out", "huggingface") == 2
    assert "cannot be expressed" in capsys.readouterr().err
    assert convert(pals, "colour", small / "out", "peft") == 2
    assert not (small / "out").exists()
