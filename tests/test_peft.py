"""LoRA in PEFT's directories: we read what `peft` saves, and `peft` loads what we write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import transformers

from pals_jax.convert import from_huggingface, from_peft, to_peft
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Bottleneck
from pals_jax.models.adapters.spec import Adapter
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.runtime.errors import UserError

peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}
CLASSES = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
}
ALL = ["query", "key", "value", "intermediate.dense", "output.dense"]  # both output.dense


def draw(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter on the scale of 1, lora_B and layer norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        mean = float(name.endswith("LayerNorm.weight"))
        torch.nn.init.normal_(parameter.data, mean, 0.3, generator=generator)


def encoder(base: Path, architecture: str = "bert", **config: Any) -> Any:
    """A classifier around the encoder that was saved in `base`, its own parameters random."""
    sizes, model = CLASSES[architecture]
    return model.from_pretrained(base, config=sizes(**SIZES | config))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder of each architecture, without a head."""
    paths = {}
    for name, (config, model) in CLASSES.items():
        paths[name] = tmp_path_factory.mktemp(name)
        module = model(config(**SIZES))
        draw(module)
        module.base_model.save_pretrained(paths[name])
    return paths


@pytest.fixture
def save(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """Saves random LoRA of `peft` on an encoder; gives the directory and the model."""

    def run(
        name: str = "lora",
        architecture: str = "bert",
        labels: int = 3,
        task_type: Any = "SEQ_CLS",
        **options: Any,
    ) -> Any:
        options = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"]} | options
        config = peft.LoraConfig(task_type=task_type, **options)
        module = encoder(bases[architecture], architecture, num_labels=labels)
        module = module if task_type else module.base_model
        model = peft.get_peft_model(module, config)
        trained = [name for name, x in model.named_parameters() if x.requires_grad]
        generator = torch.Generator().manual_seed(len(name))
        for parameter in (x for k, x in model.named_parameters() if k in trained):
            torch.nn.init.normal_(parameter.data, 0.0, 0.3, generator=generator)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model.eval()

    return run


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        output = model(**{name: torch.tensor(x).long() for name, x in tokens().items()})
    value = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return value.numpy()


def tokens() -> dict[str, np.ndarray]:
    """Inputs that both architectures take: RoBERTa has one token type and pads with 0 here."""
    arrays = tiny.inputs()
    return arrays | {
        "input_ids": np.where(arrays["attention_mask"] == 1, arrays["input_ids"], 0),
        "token_type_ids": np.zeros_like(arrays["input_ids"]),
    }


def ours(model: MultiTaskModel, variables: Any, task: int = 0, method: Any = None) -> np.ndarray:
    run = jax.jit(lambda v: model.apply(v, **tokens(), task_ids=task, method=method))
    outputs = run(variables)
    return outputs if method else outputs[:, : model.num_outputs[task]]


def check(actual: Any, desired: Any) -> None:
    assert 0.05 < np.std(desired) < 5  # the bound is absolute
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-5)


# In


CASES: list[dict[str, Any]] = [
    {},
    {"target_modules": ["key"], "labels": 1},
    {"target_modules": ALL, "r": 7, "lora_alpha": 16, "lora_dropout": 0.1},
    {"target_modules": r".*\.1\.(attention\.self\.value|output\.dense)"},
    {"layers_to_transform": [1], "use_rslora": True},
    {"exclude_modules": ["value"], "init_lora_weights": "gaussian"},
    {"architecture": "roberta"},
    {"architecture": "roberta", "target_modules": ALL, "labels": 1},
]


@pytest.mark.parametrize("options", tiny.mostly_slow(CASES, CASES[2], CASES[6]), ids=str)
def test_logits(save: Callable[..., Any], bases: dict[str, Path], options: dict[str, Any]) -> None:
    directory, module = save(**options)
    model, variables = from_peft(bases[options.get("architecture", "bert")], {"mood": directory})
    assert model.num_outputs == (options.get("labels", 3),)
    check(ours(model, variables), theirs(module))


@pytest.mark.parametrize("architecture", tiny.mostly_slow(["bert", "roberta"], "bert"))
def test_an_encoder_without_a_head(
    save: Callable[..., Any], bases: dict[str, Path], architecture: str
) -> None:
    directory, module = save(architecture=architecture, task_type=None)
    model, variables = from_peft(bases[architecture], {"mood": directory})
    assert model.method == methods.lora(3, 5)
    assert model.num_outputs == (2,)
    check(ours(model, variables, method="encode"), theirs(module))


def test_pickles(save: Callable[..., Any], bases: dict[str, Path]) -> None:
    directory, module = save()
    module.save_pretrained(directory.parent / "pickled", safe_serialization=False)
    assert (directory.parent / "pickled" / "adapter_model.bin").exists()
    paths = (directory, directory.parent / "pickled")
    tiny.assert_same(*(from_peft(bases["bert"], {"t": path})[1] for path in paths))


def test_many_on_one_base(save: Callable[..., Any], bases: dict[str, Path]) -> None:
    saved = {"mood": save("one", labels=3), "score": save("three", labels=1)}
    model, variables = from_peft(bases["bert"], {task: path for task, (path, _) in saved.items()})
    assert model.num_outputs == (3, 1)
    for task, (_, module) in enumerate(saved.values()):
        check(ours(model, variables, task), theirs(module))


# Out


OURS = {
    "query and value": methods.lora(3, 5.0),
    "all": methods.lora(7, 16.0, tuple(methods.LORA_SITES), dropout=0.1),
    "ffn_out": methods.lora(2, 4.0, ("ffn_out",)),  # its name ends as that of attention's output
    "the top layer": tuple(
        Adapter(adapter.name, adapter.site, adapter.form, layers=(1,), scale=adapter.scale)
        for adapter in methods.lora(2, 3.0, ("key", "output"))
        if isinstance(adapter, Adapter)
    ),
}


WRITTEN = [*(("bert", name) for name in OURS), ("roberta", "all")]


@pytest.mark.parametrize("case", tiny.mostly_slow(WRITTEN, ("bert", "all")), ids=" ".join)
def test_they_load_what_we_write(
    bases: dict[str, Path], tmp_path: Path, case: tuple[str, str]
) -> None:
    architecture, name = case
    base, method = bases[architecture], OURS[name]
    bare, loaded = from_huggingface(base)
    model = MultiTaskModel(bare.config, (2, 3), method)
    variables = tiny.variables(model) | {"params": loaded["params"]}
    to_peft(model, variables, 1, tmp_path / "ours")
    module = encoder(base, architecture, num_labels=3)
    module = peft.PeftModel.from_pretrained(module, tmp_path / "ours").eval()
    check(theirs(module), ours(model, variables, 1))
    back, again = from_peft(base, {"mood": tmp_path / "ours"})
    own = methods.pooler() if architecture == "roberta" else ()
    assert back.method == method + own
    for name in ["head", *(adapter.name for adapter in method)]:
        rows = (tiny.rows(v["adapters"][name], i) for v, i in ((variables, 1), (again, 0)))
        tiny.assert_same(*rows)


def test_a_roberta_comes_out_as_it_came_in(
    save: Callable[..., Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    directory, _ = save(architecture="roberta", target_modules=ALL)
    model, variables = from_peft(bases["roberta"], {"t": directory})
    to_peft(model, variables, 0, tmp_path / "ours")
    folders = (tmp_path / "ours", directory)
    tensors = [safetensors.numpy.load_file(x / "adapter_model.safetensors") for x in folders]
    tiny.assert_same(*tensors)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (methods.shared(), "no adapter"),
        (methods.pfeiffer(3), "ffn_adapter"),
        (methods.lora(2) + methods.layer_norms(), "layer_norms"),
        (methods.lora(2) + methods.pooler(), "pooler"),  # a BERT's
        (methods.lora(2) + methods.lora(3, targets=("key",)), "lora_key"),
        (methods.lora(2) + methods.lora(2, 4.0, ("key",)), "lora_key"),
        ((Adapter("x", "attention.key", Bottleneck(2, "relu", bias=False)),), "x"),
        ((Adapter("x", "ffn.output", Bottleneck(2, bias=False)),), "x"),
        (
            tuple(Adapter(x, "attention.key", Bottleneck(2, bias=False)) for x in "xy"),
            "x, y",
        ),
    ],
)
def test_methods_that_are_not_lora(method: Any, name: str, tmp_path: Path) -> None:
    model = MultiTaskModel(tiny.config(), (2,), method)
    with pytest.raises(UserError, match=rf"cannot hold .*{name}"):
        to_peft(model, {}, 0, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_tasks_that_do_not_exist(tmp_path: Path) -> None:
    model = MultiTaskModel(tiny.config(), (2,), methods.lora(2))
    with pytest.raises(UserError, match="task id 1 is out of range"):
        to_peft(model, {}, 1, tmp_path)


# Refusals


def refused(base: Path, directories: dict[str, Path], *messages: str) -> None:
    with pytest.raises(UserError) as error:
        from_peft(base, directories)
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save=['pooler']"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern={'query': 2}"),
        ({"alpha_pattern": {"query": 2}}, "alpha_pattern={'query': 2}"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow=1"),
        ({"r": 0}, "is invalid"),
    ],
)
def test_options_that_are_not_held(
    save: Callable[..., Any],
    bases: dict[str, Path],
    options: dict[str, Any],
    message: str,
) -> None:
    directory, _ = save()
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    refused(bases["bert"], {"t": directory}, str(path), message)


def test_options_that_are_missing(save: Callable[..., Any], bases: dict[str, Path]) -> None:
    directory, _ = save()
    (directory / "adapter_config.json").write_text("{}")
    refused(bases["bert"], {"t": directory}, "lacks 'r'")


def test_lora_elsewhere(save: Callable[..., Any], bases: dict[str, Path]) -> None:
    directory, _ = save("pooler", target_modules=["dense"])
    refused(bases["bert"], {"t": directory}, "unused", "pooler.dense.lora_A.weight")
    directory, _ = save("only", target_modules=["word_embeddings"])
    refused(bases["bert"], {"t": directory}, "has no LoRA on any layer")


def test_lora_that_differs(save: Callable[..., Any], bases: dict[str, Path]) -> None:
    directories = {"one": save("one")[0], "other": save("other", r=4)[0]}
    refused(bases["bert"], directories, *directories, "differ in method, size or layers")


def test_the_wrong_encoder(save: Callable[..., Any], bases: dict[str, Path]) -> None:
    directory, _ = save(architecture="roberta")
    refused(bases["bert"], {"t": directory}, "unused", "classifier.dense.weight")


def test_missing_files(save: Callable[..., Any], bases: dict[str, Path]) -> None:
    directory, _ = save()
    (directory / "adapter_model.safetensors").unlink()
    refused(bases["bert"], {"t": directory}, "has no adapter_model.safetensors or")
