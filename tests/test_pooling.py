"""Heads that read the mean of the last hidden states."""

import numpy as np
import tiny

from pals_jax.models.adapters import methods
from pals_jax.models.segments import Packing


def test_the_head_reads_the_mean_of_each_text() -> None:
    """Of two texts in a row as of each alone, whatever the pooler is."""
    rng = np.random.default_rng(0)
    model = tiny.model(methods.mean_pooling())
    variables = tiny.variables(model)
    texts = [rng.integers(3, 31, n) for n in (5, 3)]
    ids = np.concatenate([*texts, [0]])[None]
    numbers = np.array([[1] * 5 + [2] * 3 + [0]])
    packing = Packing(np.array([[0, 5]]), np.array([[0, 1]]))
    hidden = model.apply(
        variables, ids, np.zeros_like(ids), numbers, 1, packing=packing, method="encode"
    )
    pooled = model.apply(variables, hidden, 1, packing, method="pool")
    for slot, text in enumerate(texts):
        ones = np.ones((1, len(text)), int)
        bare = model.clone(method=())
        plain = {"params": variables["params"], "adapters": {"head": variables["adapters"]["head"]}}
        alone = bare.apply(plain, text[None], 0 * ones, ones, 1, method="encode")
        tiny.assert_rounded_alike(pooled[0, slot], alone[0].mean(0))


def test_it_has_no_parameters() -> None:
    model = tiny.model(methods.mean_pooling())
    assert set(tiny.variables(model)["adapters"]) == {"head"}
