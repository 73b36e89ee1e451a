"""`pals_jax.load` on checkpoints of other codes, which are told apart by their files."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_api import assert_alike

import pals_jax
from pals_jax import Task, UserError, convert
from pals_jax.data.tokenize import load_tokenizer


def write_vocabulary(directory: Path, size: int) -> None:
    """A tokenizer, as Google has it, in which the word w7 is token 7."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, size))]
    (directory / "vocab.txt").write_text("\n".join(words))


def outputs(model: Any, variables: Any, task: int, method: str | None = None) -> np.ndarray:
    """What the converted model gives for "w5 w6": logits, or what the head reads."""
    ids = np.array([[2, 5, 6, 3]], np.int32)

    @jax.jit
    def apply(variables: Any, task: Any) -> Any:
        arguments = variables, ids, np.zeros_like(ids), np.ones_like(ids), task
        if method is None:
            return model.apply(*arguments)
        return model.apply(variables, model.apply(*arguments, method="encode"), task, method=method)

    return np.asarray(apply(variables, task))


@pytest.mark.slow
def test_a_checkpoint_of_bert_n_pals(shared, tmp_path):
    with np.load(shared / "golden" / "bert_n_pals" / "pals.npz") as file:
        state = {k.removeprefix("param/"): v for k, v in file.items() if k.startswith("param/")}
        config = json.loads(file["config"].tobytes())
    np.savez(tmp_path / "model.npz", **state)
    counts = config.pop("labels")  # their own file does not have it
    (tmp_path / "pals_config.json").write_text(json.dumps(config))
    write_vocabulary(tmp_path, config["vocab_size"])
    model, variables = convert.from_bert_n_pals(config | {"labels": counts}, state)
    run = pals_jax.load(tmp_path)
    assert [task.num_outputs for task in run.tasks.values()] == counts
    for index, name in enumerate(run.tasks):
        logits = outputs(model, variables, index)[0, : counts[index]]
        (row,) = run.predict("w5 w6", task=name)
        if counts[index] == 1:
            assert row.value == pytest.approx(logits[0], abs=1e-5)
        else:
            shares = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(list(row.probabilities.values()), shares, atol=1e-5)
    assert run.predict(("w5", "w6"), task="task0")[0].texts == {"text": "w5", "text_pair": "w6"}
    tasks = [Task(f"mine{n}", ("a", "b"), labels=tuple("abc"[:n]) * (n > 1)) for n in counts]
    named = [Task(f"t{i}", task.text, labels=task.labels) for i, task in enumerate(tasks)]
    again = pals_jax.load(tmp_path, tasks=named)
    assert again.predict(("w5", "w6"), task="t0")[0].texts == {"a": "w5", "b": "w6"}
    with pytest.raises(UserError, match="needs 2 as a tuple: a, b"):
        again.predict("w5", task="t0")
    with pytest.raises(UserError, match="give one task for each head, with its labels"):
        pals_jax.load(tmp_path, tasks=named[:1])
    with pytest.raises(UserError, match="repeat a name"):
        pals_jax.load(tmp_path, tasks=[Task("x", (), labels=task.labels) for task in named])


@pytest.mark.slow
def test_a_checkpoint_of_google(shared, tmp_path):
    folder = shared / "golden" / "adapter_bert" / "adapters"
    for path in folder.glob("bert_*"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"has no tokenizer .* with base="):
        pals_jax.load(tmp_path)
    config = json.loads((folder / "bert_config.json").read_text())
    write_vocabulary(tmp_path, config["vocab_size"])
    run = pals_jax.load(tmp_path)
    checkpoint = convert.read_tf_checkpoint(folder / "bert_model.ckpt")
    model, variables = convert.from_tf_bert(config, checkpoint)
    expected = outputs(model, variables, 0, "pool")
    np.testing.assert_allclose(run.encode("w5 w6"), expected, atol=1e-5)
    by_file = pals_jax.load(tmp_path / "bert_model.ckpt")
    np.testing.assert_array_equal(by_file.encode("w5 w6"), run.encode("w5 w6"))
    if "output_weights" not in checkpoint:
        with pytest.raises(UserError, match="came without a head"):
            run.predict("w5 w6")


@pytest.mark.slow
def test_a_checkpoint_of_he_et_al(shared, tmp_path):
    with np.load(shared / "golden" / "unified_view" / "mam.npz") as file:
        arrays = dict(file)
    parts = [
        {k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)}
        for part in ("param/", "prefix/")
    ]
    for name, tensors in zip(("model", "prefix"), parts, strict=True):
        np.savez(tmp_path / f"{name}.npz", **tensors)
    (tmp_path / "config.json").write_bytes(arrays["config"].tobytes())
    config = json.loads(arrays["config"].tobytes())
    write_vocabulary(tmp_path, config["vocab_size"])
    run = pals_jax.load(tmp_path)
    model, variables = convert.from_unified_view(config, *parts)
    expected = outputs(model, variables, 0, "pool")
    np.testing.assert_allclose(run.encode("w5 w6"), expected, atol=1e-5)


@pytest.mark.slow
def test_a_directory_of_adapterhub(shared, tmp_path):
    source = shared / "golden" / "adapterhub" / "bert" / "houlsby"
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").symlink_to(source / "config.json")
    (base / "model.safetensors").symlink_to(source / "base.safetensors")
    write_vocabulary(base, json.loads((source / "config.json").read_text())["vocab_size"])
    with pytest.raises(UserError, match=r"\(adapterhub\) lacks the encoder; .* with base="):
        pals_jax.load(source / "adapter_safetensors")
    run = pals_jax.load(source / "adapter_safetensors", base=base)
    model, variables = convert.from_adapterhub(base, {"x": source / "adapter_safetensors"})
    expected = outputs(model, variables, 0, "pool")
    np.testing.assert_allclose(run.encode("w5 w6"), expected, atol=1e-5)
    with pytest.raises(UserError, match="task adapter_safetensors came without a head"):
        run.predict("w5 w6")
    run.save(tmp_path / "run")
    with pytest.raises(UserError, match="came without a head"):
        pals_jax.load(tmp_path / "run").predict("w5 w6")
    with pytest.raises(UserError, match="no task of the run has a head to evaluate"):
        run.evaluate()
    with pytest.raises(UserError, match="holds an encoder without a classifier"):
        pals_jax.load(base)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "bart"}
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config))
    for name in (None, "unified_view"):
        with pytest.raises(UserError, match="holds an encoder-decoder"):
            pals_jax.load(base, format=name)


@pytest.fixture(scope="module")
def classifier(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of transformers with three named labels."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("classifier") / "mood"
    labels = ["bad", "so so", "good"]
    config = transformers.BertConfig.from_pretrained(
        tiny_encoder,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(directory)
    load_tokenizer(tiny_encoder).save_pretrained(directory)
    return directory


def test_a_classifier_of_hugging_face(classifier, tmp_path):
    import torch
    import transformers

    theirs = transformers.BertForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    run = pals_jax.load(classifier)
    assert run.tasks["mood"].labels == ("bad", "so so", "good")
    for texts in (("red ball",), ("red ball", "a box")):
        with torch.no_grad():
            expected = theirs(**tokenizer(*texts, return_tensors="pt")).logits.softmax(-1)[0]
        (row,) = run.predict(texts)
        assert list(row.texts) == ["text", "text_pair"][: len(texts)]
        np.testing.assert_allclose(list(row.probabilities.values()), expected, atol=1e-5)
    with pytest.raises(UserError, match="text 2: the number of texts is 2, and 1 before"):
        run.predict(["red ball", ("red", "ball")])
    # As a workdir, it is a run like any other.
    run.save(tmp_path / "run")
    assert_alike(pals_jax.load(tmp_path / "run").predict("red box"), run.predict("red box"))
    with pytest.raises(UserError, match="made from task files can only predict"):
        run.evaluate()


@pytest.mark.slow
def test_a_directory_of_peft(tiny_encoder, classifier, tmp_path):
    """With and without a saved classifier, and beside another format."""
    import peft
    import transformers

    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model = transformers.BertForSequenceClassification.from_pretrained(classifier)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    run = pals_jax.load(tmp_path / "lora", base=tiny_encoder)
    assert run.predict("red box")[0].label in ("LABEL_0", "LABEL_1", "LABEL_2")
    features = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query"])
    bare = transformers.BertModel.from_pretrained(tiny_encoder)
    peft.get_peft_model(bare, features).save_pretrained(tmp_path / "bare")
    run = pals_jax.load(tmp_path / "bare", base=tiny_encoder, tasks=[Task("mine", ("a",))])
    assert run.encode("red box", task="mine").shape == (1, 24)
    shutil.copytree(classifier, tmp_path / "both")
    shutil.copytree(tmp_path / "lora", tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"several formats, peft and huggingface; name one"):
        pals_jax.load(tmp_path / "both")
    assert list(pals_jax.load(tmp_path / "both", format="huggingface").tasks) == ["both"]
