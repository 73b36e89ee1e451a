"""Forms without a golden file, compared with PyTorch, transformers and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from torch.nn.functional import gelu, layer_norm

from pals_jax.convert import from_huggingface
from pals_jax.models import layers
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.blocks import Blocks
from pals_jax.models.adapters.forms import Context, Dense, Form, Param, ProjectedFeedForward
from pals_jax.models.segments import make_segments

IDS = np.array([[2, 5, 9, 7, 3], [2, 11, 3, 0, 0]], np.int32)
MASK = (IDS > 0).astype(np.int32)
TYPES = np.zeros_like(IDS)


def torch_linear(params: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ torch.tensor(params["kernel"]) + torch.tensor(params["bias"])


def ffn_blocks(params: Any, x: torch.Tensor) -> torch.Tensor:
    z = torch_linear(params["down"], x)
    for i in range(3):
        block = tiny.rows(params["blocks"], i)
        y = torch_linear(
            block["ffn"]["output"], gelu(torch_linear(block["ffn"]["intermediate"], z))
        )
        norm = {"weight": block["norm"]["scale"], "bias": block["norm"]["bias"]}
        z = layer_norm(z + y, (6,), **{k: torch.tensor(v) for k, v in norm.items()}, eps=1e-12)
    return torch_linear(params["up"], z)


def test_gelu_and_its_derivative():
    x = np.linspace(-9, 9, 721, dtype=np.float32)
    given = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = gelu(given)
    expected.sum().backward()
    y, backward = jax.vjp(layers.gelu, jnp.asarray(x))
    np.testing.assert_allclose(y, expected.detach(), atol=1e-6)
    np.testing.assert_allclose(backward(jnp.ones_like(y))[0], given.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "reference"),
    [
        (Dense("tanh"), lambda p, x: torch.tanh(torch_linear(p["dense"], x))),
        (
            ProjectedFeedForward(5),
            lambda p, x: torch_linear(
                p["up"], gelu(torch_linear(p["ffn_0"], torch_linear(p["down"], x)))
            ),
        ),
        (
            ProjectedFeedForward(5, depth=2, activation="relu"),
            lambda p, x: torch_linear(
                p["up"],
                torch_linear(
                    p["ffn_1"], torch.relu(torch_linear(p["ffn_0"], torch_linear(p["down"], x)))
                ),
            ),
        ),
        (Blocks("ffn", 3, size=6, heads=1), ffn_blocks),
    ],
)
def test_against_pytorch(form: Form, reference: Callable[..., torch.Tensor]) -> None:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda param: rng.normal(0, 0.5, param.shape).astype(np.float32),
        form.parameters(12, 12, tiny.config()),
        is_leaf=lambda x: isinstance(x, Param),
    )
    x = rng.normal(size=(2, 7, 12)).astype(np.float32)
    context = Context(tiny.config(), make_segments(jnp.ones((2, 7), int), jnp.zeros((2, 1), int)))
    expected = reference(params, torch.tensor(x)).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(form(params, x, context), expected, rtol=0, atol=1e-5)


def encode(model: Any, variables: Any) -> np.ndarray:
    return jax.jit(model.apply, static_argnames="method")(
        variables, IDS, TYPES, MASK, 0, method="encode"
    )


def test_prompts_are_positions_of_the_encoder(tiny_encoder: Path) -> None:
    """Beside the embeddings that transformers makes, looked at by its own layers."""
    model, variables = from_huggingface(tiny_encoder, methods.prompt_tuning(3))
    theirs = transformers.BertModel.from_pretrained(tiny_encoder).eval()
    prompt = np.random.default_rng(0).normal(size=(1, 3, 24)).astype(np.float32)
    variables["adapters"]["prompt"]["shared"]["embedding"] = jnp.asarray(prompt)
    with torch.no_grad():
        h = theirs.embeddings(torch.tensor(IDS).long(), torch.tensor(TYPES).long())
        h = torch.cat([h, torch.tensor(prompt).expand(2, -1, -1)], dim=1)
        visible = torch.tensor(np.pad(MASK, [(0, 0), (0, 3)], constant_values=1)).bool()
        for layer in theirs.encoder.layer:
            h = layer(h, attention_mask=visible[:, None, None])
            h = h[0] if isinstance(h, tuple) else h
    real = MASK > 0
    actual = encode(model, variables)
    np.testing.assert_allclose(actual[real], h[:, :5].numpy()[real], rtol=0, atol=1e-5)


def test_ia3_is_that_of_peft(tiny_encoder: Path) -> None:
    model, variables = from_huggingface(tiny_encoder, methods.ia3())
    config = peft.IA3Config(
        target_modules=["key", "value", r"layer.0.output.dense", r"layer.1.output.dense"],
        feedforward_modules=[r"layer.0.output.dense", r"layer.1.output.dense"],
    )
    theirs = peft.get_peft_model(transformers.BertModel.from_pretrained(tiny_encoder), config)
    rng = np.random.default_rng(0)
    factors = {"key": [], "value": [], "ffn": []}
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            which = next((k for k in ("key", "value") if f".{k}." in name), "ffn")
            value = rng.normal(1.0, 0.3, parameter.numel()).astype(np.float32)
            parameter.data = torch.tensor(value).reshape(parameter.shape)
            factors[which].append(value)
    for which, values in factors.items():
        variables["adapters"][f"ia3_{which}"]["layers"]["scale"] = jnp.asarray([values])
    with torch.no_grad():
        inputs = (torch.tensor(x).long() for x in (IDS, MASK, TYPES))
        expected = theirs.eval()(*inputs).last_hidden_state.numpy()
    np.testing.assert_allclose(encode(model, variables), expected, rtol=0, atol=1e-5)
