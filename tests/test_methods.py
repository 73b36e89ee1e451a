"""Methods as values: expressions, errors, and the published parameter counts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pals_jax.cli import main
from pals_jax.convert import huggingface
from pals_jax.models import counts, method_table
from pals_jax.models.adapters import methods, serialize
from pals_jax.models.adapters.forms import Bottleneck, ProjectedAttention
from pals_jax.models.adapters.parse import parse_method
from pals_jax.models.adapters.spec import Adapter
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.models.shapes import variable_shapes
from pals_jax.runtime.errors import UserError


def count(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# BERT-base, biases in, heads out. The published multiples have two digits; that of rank 100 is
# 1.1347 without biases, hence 1.13, and 1.1354 with them.
@pytest.mark.parametrize(
    ("expression", "per_task", "multiple"),
    [
        ("shared", 0, 1.00),
        ("pals(size=204)", 1_819_836, 1.13),
        ('pals(size=276, layers="final_half")', 1_801_116, 1.13),
        ('pals(size=276, layers="first_half")', 1_801_116, 1.13),
        ("pals(size=84, shared=False)", 1_815_552, 1.13),
        ("low_rank(size=100)", 1_853_616, 1.13),
        ("bert_n_pals_houlsby(size=50)", 1_862_832, 1.14),
        ("top_attention(size=204, blocks=6)", 1_320_444, 1.10),
        ("top_ffn(size=204, blocks=6)", 1_319_220, 1.10),
        ("top_layer", 7_087_872, 1.52),
        ("lhuc", 9_216, 1.0007),
        ("houlsby(size=8)", 351_936, 1 + 8 * 0.0032),
        ("houlsby(size=64)", 2_417_664, 1 + 8 * 0.0221),
        ("houlsby(size=256)", 9_500_160, 1 + 8 * 0.0868),
    ],
)
def test_parameter_counts_are_the_published_ones(
    expression: str, per_task: int, multiple: float
) -> None:
    model = MultiTaskModel(BertConfig(), (2,) * 8, parse_method(expression))
    # Shapes only: no array of BERT-base is built.
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    adapters = {name: tree for name, tree in shapes["adapters"].items() if name != "head"}
    base = count(shapes["params"])
    assert base == 109_482_240
    assert count(adapters) == 8 * per_task
    assert (base + count(adapters)) / base == pytest.approx(multiple, abs=0.006)


def per_task(expression: str, config: BertConfig) -> int:
    return counts.count(MultiTaskModel(config, (2,), parse_method(expression))).per_task


@pytest.mark.parametrize("expression", ["pals + layer_norms", "prefix_tuning", "top_layers"])
def test_shapes_are_those_of_the_model(expression: str) -> None:
    config = BertConfig(
        vocab_size=7,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=16,
    )
    model = MultiTaskModel(config, (2, 3), parse_method(expression))
    traced = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    assert variable_shapes(model) == traced


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        # He et al., section 3: prefix 2ld, adapters 2rd, LoRA 4rd at attention, 10rd at ffn.
        ("prefix_tuning(length=7, bottleneck=0)", 2 * 7 * 768),
        ("multi_head_parallel(size=7)", 2 * 7 * 768),
        ("parallel(size=7)", 2 * 7 * 768 + 7 + 768),
        ("pfeiffer(size=7)", 2 * 7 * 768 + 7 + 768),
        ("lora(rank=7)", 4 * 7 * 768),
        ("lora(rank=7, targets=('ffn_in', 'ffn_out'))", 10 * 7 * 768),
        ("ia3", 2 * 768 + 3072),
        ("layer_norms", 2 * 2 * 768 + 2 * 768 / 12),
    ],
)
def test_parameters_of_a_layer(expression: str, expected: float) -> None:
    assert per_task(expression, BertConfig()) == 12 * expected


def test_published_shares() -> None:
    """Of MAM on RoBERTa-base (He et al., table 2), of adapters on BERT-large (Houlsby et al.).

    The seventeen extra tasks of Houlsby et al. are not here (adapters 1.14% and 1.19x, top layers
    9.9x): each task chose its own size (2 to 64) or number of layers (1 to 12), and the figures are
    means over choices that are not published with them.
    """
    roberta, large = huggingface.KNOWN["roberta-base"], huggingface.KNOWN["bert-large-uncased"]
    mam = parse_method("mam(prefix=16, size=16)")
    assert counts.count(MultiTaskModel(roberta, (2,), mam)).multiple == pytest.approx(
        1.005, abs=5e-4
    )
    of_sizes = [
        counts.count(MultiTaskModel(large, (2,) * 9, methods.houlsby(m))) for m in (8, 64, 256)
    ]
    # A share "trained per task" is one of the layers and the pooler, without the embeddings.
    layers = of_sizes[0].encoder - (30522 + 512 + 2 + 2) * 1024
    assert of_sizes[1].multiple == pytest.approx(1.2, abs=0.05)
    assert of_sizes[1].per_task / layers == pytest.approx(0.021, abs=5e-4)
    # Of 8 to 256, each task's best: the mean share, as if each size were chosen equally often.
    assert np.mean([c.multiple for c in of_sizes]) == pytest.approx(1.3, abs=0.05)
    assert np.mean([c.per_task for c in of_sizes]) / layers == pytest.approx(0.036, abs=5e-4)


@pytest.mark.parametrize(
    ("expression", "method"),
    [
        ("shared", ()),
        ("shared()", ()),
        ("pals", methods.pals()),
        (" pals( size = 12,heads=4 ) ", methods.pals(12, 4)),
        ("pals(layers=[0, 3], size=6)", methods.pals(6, layers=(0, 3))),
        (
            'pals(layers="final_half", shared=False)',
            methods.pals(layers="final_half", shared=False),
        ),
        ("low_rank(size=7, activation='gelu')", methods.low_rank(7, "gelu")),
        ("pals(size=6) + pooler", (*methods.pals(6), *methods.pooler())),
        (
            "lora(targets=['key']) + lhuc() + pooler()",
            (*methods.lora(targets=("key",)), *methods.lhuc(), *methods.pooler()),
        ),
    ],
)
def test_parse(expression: str, method: methods.Method) -> None:
    assert parse_method(expression) == method
    hash(parse_method(expression))  # A method is a value that a module may hold.


@pytest.mark.parametrize("name", tiny.METHODS)
def test_a_method_is_json_and_back(name: str) -> None:
    """Each of the catalogue, as task files hold it."""
    assert parse_method(serialize.dumps(tiny.METHODS[name])) == tiny.METHODS[name]


@pytest.mark.parametrize(
    "text", ["[", "[1]", "[{}]", '[{"type": "New"}]', '[{"type": "Adapter", "size": 3}]']
)
def test_json_that_is_no_method(text: str) -> None:
    with pytest.raises(UserError, match="cannot read the method"):
        parse_method(text)


def test_methods_are_sentences_about_sites() -> None:
    assert methods.pals() == (
        Adapter("pal", "layer", ProjectedAttention(204, 6), shared=("down", "up")),
    )
    assert methods.pals(shared=False) == (Adapter("pal", "layer", ProjectedAttention(204, 6)),)
    assert methods.low_rank() == (Adapter("low_rank", "layer", Bottleneck(100)),)


UNREADABLE = "cannot read the method"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", UNREADABLE),
        ("2", UNREADABLE),
        ("pals(", UNREADABLE),
        ("pals(204)", UNREADABLE),
        ("pals(*[204])", UNREADABLE),
        ("pals(size=width)", UNREADABLE),
        ("pals(size=2 * 3)", UNREADABLE),
        ("models.pals(size=6)", UNREADABLE),
        ("pals(size=6); shared", UNREADABLE),
        ("pals(size=6, size=12)", UNREADABLE),
        ("pals(**{'size': 6})", UNREADABLE),
        ("palls(size=6)", "unknown method 'palls'; known are shared, pals, low_rank"),
        ("pals(width=6)", "pals has no option 'width'; its options are size, heads"),
        ("shared(size=6)", "shared has no option 'size'; its options are none"),
        ("pals(size=100)", "size 100 .* not a multiple of its 6 heads"),
        ("pals(heads=0)", "0 heads"),
        ("pals(heads=2.0)", "2.0 heads"),
        ("pals(size=-6)", "whole number from 1, not -6"),
        ("low_rank(size=0)", "whole number from 1, not 0"),
        ("low_rank(size=2.5)", "whole number from 1, not 2.5"),
        ("low_rank(size='big')", "whole number from 1, not 'big'"),
        ("pals - pooler", UNREADABLE),
        ("lora(targets=('querry',))", r"a list of query, key, value.* not \('querry',\)"),
        ("lora(targets='query')", "a list of .* not 'query'"),
        ("lora(targets=())", r"a list of .* not \(\)"),
        ("lora(rank=0)", "whole number from 1, not 0"),
        ("lora(alpha='x')", "alpha of lora is a number, not 'x'"),
        ("lora(dropout=2.0)", "dropout is a share from 0 to 1, not 2.0"),
        ("lora(dropout='x')", "dropout of lora is a number, not 'x'"),
        ("houlsby(norms='no')", "norms of houlsby is True or False, not 'no'"),
        ("prefix_tuning(bottleneck=-5)", "whole number from 0, not -5"),
        ("prefix_tuning(length=2.5)", "whole number from 1, not 2.5"),
        ("top_attention(blocks='x')", "whole number from 1, not 'x'"),
        ("top_attention(size=100)", "size 100 of the blocks .* 12 heads"),
        ("top_layer(count=0)", "whole number from 1, not 0"),
        ("top_layers(count=2.5)", "whole number of layers from 1, not 2.5"),
        ("mam(scale=1e999)", "number or 'learned', not inf"),
        ("pals(heads='6')", "'6' heads"),
        ("parallel(site='top')", "site is ffn or attention, not 'top'"),
        ("scaled_parallel(scale='big')", "number or 'learned', not 'big'"),
        ("projected_ffn(depth=3)", "are 1 or 2, not 3"),
        ("low_rank(activation='elu')", "unknown activation 'elu'; known are identity, gelu"),
    ],
)
def test_parse_refuses(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_method(expression)


@pytest.mark.parametrize(
    "layers", ['"top"', "12", "[12]", "[-13]", "[]", "[0.5]", '["a"]', "[[0]]", "None"]
)
def test_layers_that_do_not_exist(layers: str) -> None:
    """What a layer list may hold is known only with the depth of the encoder."""

    def indices() -> object:
        return [a.layer_indices(12) for a in parse_method(f"pals(layers={layers})")]

    with pytest.raises(UserError, match="layers="):
        indices()


# The catalogue


def test_the_documentation_shows_the_table_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    table = page.split("<!-- pals-jax methods --markdown -->\n")[1].split("\n<!-- end -->")[0]
    assert table == method_table.markdown()


def test_the_command_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = [row["method"].split("(")[0] for row in rows if row["method"]]
    assert names == list(methods.METHODS)
    assert all(tuple(row) == method_table.COLUMNS for row in rows)
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == method_table.markdown()
    assert main(["methods"]) == 0
    assert "houlsby" in capsys.readouterr().err


@pytest.mark.parametrize(("init", "bound"), [("near_identity", 2e-3), (0.1, 0.2)])
def test_the_initial_scale_of_adapters(init: str | float, bound: float) -> None:
    """Truncated at two standard deviations; the biases are 0."""
    adapter = methods.houlsby(size=24, init=init)[1]
    down = adapter.form.parameters(32, 32, tiny.config())["down"]
    kernel = down["kernel"].init(jax.random.key(0), down["kernel"].shape, jnp.float32)
    assert bound / 2 < abs(kernel).max() < 1.15 * bound  # of the truncated normal, rescaled
    assert not down["bias"].init(jax.random.key(0), (24,), jnp.float32).any()
