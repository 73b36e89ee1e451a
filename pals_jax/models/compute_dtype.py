"""Weights in the dtype that a model computes in, where it casts them before every use anyway."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pals_jax.models.adapters.bound import overlay
from pals_jax.models.adapters.forms import Params


def in_compute_dtype(variables: Params, dtype: Any) -> Params:
    """`variables` with the `only_cast` leaves in `dtype`; a model gives the same, bit for bit."""
    return overlay(variables, jax.tree.map(lambda x: x.astype(dtype), only_cast(variables, dtype)))


def only_cast(variables: Params, dtype: Any) -> Params:
    """The leaves of which a model uses nothing but their cast to `dtype`, if that changes them.

    They are kernels and biases of the stacks' projections, and the vocabulary of an
    encoder-decoder. BERT's embeddings are added in float32, layer norms scale and shift in float32,
    and adapters and heads may compute in float32.

    Args:
        variables: {"params", "adapters"}, or a part of it; the leaves are arrays or shapes.
        dtype: the dtype of the model's computation.
    """
    leaves = flatten_dict(variables)

    def is_cast(path: tuple[str, ...]) -> bool:
        *module, name = path
        of_projection = name in ("kernel", "bias") and (*module, "kernel") in leaves
        return path[0] == "params" and (of_projection or path[1:] == ("vocabulary", "embedding"))

    return unflatten_dict({p: x for p, x in leaves.items() if is_cast(p) and x.dtype != dtype})
