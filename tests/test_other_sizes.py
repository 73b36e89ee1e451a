"""Methods without a golden file, in whole models of another size, compared with PyTorch.

The encoder is transformers', taken apart where a method changes it; the methods are reimplemented
in PyTorch. (tests/test_forms.py tests each form alone, at the tiny size.)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.nn.functional import gelu, layer_norm

from pals_jax.convert import from_huggingface
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.methods import Method
from pals_jax.models.multitask import MultiTaskModel

DEPTH, WIDTH, HEADS, LENGTH = 4, 20, 5, 11
Params = Mapping[str, Any]
Change = Callable[[Params, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, MultiTaskModel, Any]:
    """A random BERT of transformers, and ours of two tasks around it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=28,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("encoder")
    theirs = transformers.BertModel(config).eval()
    theirs.save_pretrained(folder)
    model, variables = from_huggingface(folder, tasks=(2, 3))
    return theirs, model, variables["params"]


# The methods in PyTorch: params holds one task's parameters in one layer; x is [B, L, D], and
# visible, bool [B, L], says which positions may be looked at.


def linear(params: Params, x: torch.Tensor) -> torch.Tensor:
    return x @ params["kernel"] + params["bias"]


def pal(params: Params, x: torch.Tensor, visible: torch.Tensor, heads: int = 3) -> torch.Tensor:
    z = linear(params["down"], x)
    query, key, value = (
        linear(params[name], z).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    z = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible[:, None, None]
    )
    return gelu(linear(params["up"], z.transpose(1, 2).flatten(2)))


def low_rank(params: Params, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return linear(params["up"], gelu(linear(params["down"], x)))


def projected_ffn(params: Params, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    z = gelu(linear(params["ffn_0"], linear(params["down"], x)))
    return linear(params["up"], linear(params["ffn_1"], z) if "ffn_1" in params else z)


def top_ffn(params: Params, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    z = linear(params["down"], x)
    blocks = params["blocks"]
    for i in range(len(blocks["norm"]["bias"])):
        ffn, norm = (jax.tree.map(lambda p, i=i: p[i], blocks[name]) for name in ("ffn", "norm"))
        y = linear(ffn["output"], gelu(linear(ffn["intermediate"], z)))
        z = layer_norm(z + y, z.shape[-1:], norm["scale"], norm["bias"], eps=1e-12)
    return linear(params["up"], z)


def top_dense(params: Params, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return torch.tanh(linear(params["dense"], x))


def beside(change: Change, layers: tuple[int, ...], serial: bool = False) -> Callable[..., Any]:
    """LN(a + FFN(a) + change(h)) in some layers; or serially, LN(s + change(s)) of that sum s."""

    def run(model: Any, params: Params, h: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(model.encoder.layer):
            a = layer.attention(h, attention_mask=visible[:, None, None])[0]
            s = a + layer.output.dense(layer.intermediate(a))
            if number in layers:
                place = layers.index(number)
                own = jax.tree.map(lambda p, place=place: p[place], params.get("layers", {}))
                s = s + change({**params.get("shared", {}), **own}, s if serial else h, visible)
            h = layer.output.LayerNorm(s)
        return h

    return run


def on_top(change: Change) -> Callable[..., Any]:
    def run(model: Any, params: Params, h: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return change(params["shared"], beside(change, ())(model, params, h, visible), visible)

    return run


ALL = tuple(range(DEPTH))
CASES: dict[str, tuple[Method, Callable[..., Any]]] = {
    "projected_ffn": (methods.projected_ffn(7), beside(projected_ffn, ALL)),
    "projected_ffn, two layers": (
        methods.projected_ffn(9, depth=2, layers="final_half"),
        beside(projected_ffn, (2, 3)),
    ),
    "pals, serial": (methods.pals(6, heads=3, serial=True), beside(pal, ALL, serial=True)),
    "pals, V not shared, serial": (
        methods.pals(9, heads=3, layers=(1, 3), shared=False, serial=True),
        beside(pal, (1, 3), serial=True),
    ),
    "low_rank, serial": (
        methods.low_rank(3, "gelu", layers="first_half", serial=True),
        beside(low_rank, (0, 1), serial=True),
    ),
    "top_ffn": (methods.top_ffn(8, blocks=3), on_top(top_ffn)),
    "top_dense": (methods.top_dense("tanh"), on_top(top_dense)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_against_pytorch(case: str, encoder: tuple[Any, MultiTaskModel, Any]) -> None:
    method, reference = CASES[case]
    theirs, model, params = encoder
    model = model.clone(method=method)
    adapters = tiny.variables(model)["adapters"]
    tokens = tiny.inputs(rows=3, length=LENGTH).values()
    with jax.disable_jit():  # ten times as fast as compiling
        variables = {"params": params, "adapters": adapters}
        actual = np.asarray(model.apply(variables, *tokens, 1, method="encode"))
    ids, types, mask = (torch.tensor(x).long() for x in tokens)
    params = jax.tree.map(torch.tensor, tiny.rows(adapters[method[0].name], 1))
    with torch.no_grad():
        bare = theirs(ids, mask, types).last_hidden_state.numpy()
        expected = reference(theirs, params, theirs.embeddings(ids, types), mask > 0).numpy()
    assert np.abs(expected - bare).max() > 0.1  # the method does something
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
