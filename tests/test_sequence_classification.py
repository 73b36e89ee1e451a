"""Classifiers of transformers, read and written, compared with its PyTorch classes."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from pals_jax.convert.sequence_classification import (
    from_sequence_classification,
    to_sequence_classification,
)
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck, Scale
from pals_jax.models.adapters.spec import Adapter, Method
from pals_jax.models.merge import merged
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

ROBERTA = {"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1}
SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 9,
}

# Adapters of which every one is a change of the encoder's weights, at every such place.
WEIGHTS = {
    "shared": methods.shared(),
    "lora": methods.lora(rank=2, alpha=3.0, targets=tuple(methods.LORA_SITES), dropout=0.1),
    "lora on one layer, with factors": (
        Adapter("low_rank", "ffn.projection", Bottleneck(2), layers=(1,), scale="learned"),
        Adapter("one_down", "attention.key", Bottleneck(2), shared=("down",)),
        *methods.ia3(),
        Adapter("heads", "attention.heads", Scale(), layers=(0, 2), compose="multiply"),
    ),
    "ia3": methods.ia3(),
    "copies": methods.layer_norms() + methods.pooler(),
    "biases": methods.bitfit(),
    "copies and lora": methods.top_layers() + methods.lora(rank=2),
}


def arrays(roberta: bool, length: int = 7) -> dict[str, np.ndarray]:
    batch = tiny.inputs(length=length)
    if roberta:
        batch["token_type_ids"][:] = 0
        batch["input_ids"][batch["attention_mask"] == 0] = 1
    return batch


def ours(model: MultiTaskModel, variables: Any, task: int, batch: Any) -> np.ndarray:
    logits = jax.jit(model.apply)(variables, **batch, task_ids=np.int32(task))
    return np.asarray(logits)[:, : model.num_outputs[task]]


def theirs(folder: Path, batch: Any) -> np.ndarray:
    """The logits of whatever class config.json names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, report = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, unexpected or mis-shaped
    with torch.no_grad():
        return model.eval()(**{name: torch.tensor(x) for name, x in batch.items()}).logits.numpy()


# In


def saved(folder: Path, kind: str, **config: Any) -> Path:
    """A saved classifier whose parameters are on the scale of 1."""
    settings = transformers.AutoConfig.for_model(kind, **SIZES, **config)
    model = transformers.AutoModelForSequenceClassification.from_config(settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = float(name.endswith("LayerNorm.weight"))
        torch.nn.init.normal_(parameter, mean, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", tiny.mostly_slow(["bert", "roberta"], "bert"))
@pytest.mark.parametrize(
    "problem",
    tiny.mostly_slow([{}, {"num_labels": 4}, {"num_labels": 1, "problem_type": "regression"}], {}),
)
def test_logits_of_a_saved_classifier(tmp_path: Path, kind: str, problem: Any) -> None:
    types = {"type_vocab_size": 1} if kind == "roberta" else {}
    folder = saved(tmp_path, kind, **types, **problem)
    model, variables = from_sequence_classification(folder)
    assert model.num_outputs == (problem.get("num_labels", 2),)
    batch = arrays(kind == "roberta")
    expected = theirs(folder, batch)
    assert expected.std() > 0.01
    np.testing.assert_allclose(ours(model, variables, 0, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems_are_refused(tmp_path: Path, problem: str) -> None:
    folder = saved(tmp_path, "bert", problem_type=problem, num_labels=3)
    with pytest.raises(UserError, match=f"the problem {problem} with 3 outputs"):
        from_sequence_classification(folder)


def test_an_encoder_is_no_classifier(tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"missing classifier\.weight; missing classifier\.bias"):
        from_sequence_classification(tiny_encoder)


# Out


@pytest.mark.parametrize("roberta", tiny.mostly_slow([False, True], False))
@pytest.mark.parametrize("name", tiny.mostly_slow(WEIGHTS, "lora", "copies"))
def test_logits_of_a_written_classifier(tmp_path: Path, name: str, roberta: bool) -> None:
    model = MultiTaskModel(
        tiny.config(**(ROBERTA if roberta else {})), tiny.NUM_OUTPUTS, WEIGHTS[name]
    )
    variables, batch = tiny.variables(model), arrays(roberta)
    for task in (0, 1):
        folder = tmp_path / str(task)
        to_sequence_classification(model, variables, task, folder)
        expected = ours(model, variables, task, batch)
        assert expected.std() > 0.01
        np.testing.assert_allclose(theirs(folder, batch), expected, rtol=0, atol=1e-5)


def test_there_and_back(tmp_path: Path) -> None:
    model = MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS)
    variables = tiny.variables(model)
    to_sequence_classification(model, variables, 2, tmp_path, ["no", "maybe", "yes"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert config["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert config["problem_type"] == "single_label_classification"
    again, read = from_sequence_classification(tmp_path)
    assert again == MultiTaskModel(model.config, (3,))
    tiny.assert_same(read["params"], variables["params"])
    tiny.assert_same(tiny.rows(read["adapters"], 0), tiny.rows(variables["adapters"], 2))


@pytest.mark.parametrize(
    ("method", "left"),
    [
        (methods.pals(size=6, heads=3), "pal"),
        (methods.houlsby(size=2), "attention_adapter, ffn_adapter"),
        (methods.lhuc(), "lhuc"),
        (methods.lora(rank=2) + methods.prefix_tuning(length=2), "prefix"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path: Path, method: Method, left: str) -> None:
    model = MultiTaskModel(tiny.config(), (2,), method)
    with pytest.raises(UserError, match=f"^the task's {left} cannot be expressed in Bert"):
        to_sequence_classification(model, tiny.variables(model), 0, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_wrong_labels_and_tasks(tmp_path: Path) -> None:
    model = MultiTaskModel(tiny.config(), (2, 3))
    variables = tiny.variables(model)
    with pytest.raises(UserError, match="task 0 needs 2 different labels"):
        to_sequence_classification(model, variables, 0, tmp_path, ["a", "a"])
    with pytest.raises(UserError, match="task id 2 is out of range; the 2 tasks are 0 to 1"):
        to_sequence_classification(model, variables, 2, tmp_path)


# Merging


def test_what_cannot_be_merged_stays_and_keeps_its_place() -> None:
    """A factor behind an adapter that stays must stay too: it scales what that one adds."""
    stays = Adapter("stays", "ffn.intermediate", Bottleneck(3, "relu"))
    behind = Adapter("behind", "ffn.intermediate", Scale(), compose="multiply")
    method = (stays, behind, *methods.ia3(), *methods.layer_norms(), *methods.pals(6, heads=3))
    model = MultiTaskModel(tiny.config(), tiny.NUM_OUTPUTS, method)
    variables, batch = tiny.variables(model), tiny.inputs()
    before = jax.tree.map(np.array, variables)
    alone, values = merged(model, variables, 2)
    assert alone.num_outputs == (3,)
    assert [spec.name for spec in alone.method] == ["stays", "behind", "pal"]
    assert set(values["adapters"]) == {"stays", "behind", "pal", "head"}
    expected = ours(model, variables, 2, batch)
    np.testing.assert_allclose(ours(alone, values, 0, batch), expected, rtol=0, atol=1e-5)
    tiny.assert_same(variables, before)
