"""Methods as values: expressions, refusals, and the published parameter counts."""

import jax
import pytest

from pals_jax.errors import UserError
from pals_jax.models import methods
from pals_jax.models.adapters import Adapter
from pals_jax.models.bert import BertConfig
from pals_jax.models.forms import Bottleneck, ProjectedAttention
from pals_jax.models.multitask import MultiTaskModel, init_variables


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
    ],
)
def test_parameter_counts_are_the_published_ones(
    expression: str, per_task: int, multiple: float
) -> None:
    model = MultiTaskModel(BertConfig(), (2,) * 8, methods.parse(expression))
    # Shapes only: no array of BERT-base is built.
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    adapters = {name: tree for name, tree in shapes["adapters"].items() if name != "head"}
    base = count(shapes["params"])
    assert base == 109_482_240
    assert count(adapters) == 8 * per_task
    assert (base + count(adapters)) / base == pytest.approx(multiple, abs=0.006)


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
    ],
)
def test_parse(expression: str, method: methods.Method) -> None:
    assert methods.parse(expression) == method
    hash(methods.parse(expression))  # A method is a value that a module may hold.


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
        ("pals(width=6)", "unexpected keyword argument 'width'"),
        ("shared(size=6)", "unexpected keyword argument 'size'"),
        ("pals(size=100)", "size 100 .* not a multiple of its 6 heads"),
        ("pals(heads=0)", "0 heads"),
        ("pals(heads=2.0)", "2.0 heads"),
        ("pals(size=-6)", "whole number from 1, not -6"),
        ("low_rank(size=0)", "whole number from 1, not 0"),
        ("low_rank(size=2.5)", "whole number from 1, not 2.5"),
        ("low_rank(size='big')", "whole number from 1, not 'big'"),
        ("low_rank(activation='elu')", "unknown activation 'elu'; known are identity, gelu"),
    ],
)
def test_parse_refuses(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.parse(expression)


@pytest.mark.parametrize("layers", ['"top"', "12", "[12]", "[-13]", "[]", "[0.5]", '["a"]', "None"])
def test_layers_that_do_not_exist(layers: str) -> None:
    """What a layer list may hold is known only with the depth of the encoder."""

    def indices() -> object:
        return [a.layer_indices(12) for a in methods.parse(f"pals(layers={layers})")]

    with pytest.raises(UserError, match="layers="):
        indices()
