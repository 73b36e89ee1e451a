"""Where the time of a step goes: the compiler's estimate of its cycles, by part of the step.

A fusion belongs to the part of the operation that the compiler names it after, even where it has
others in it.
"""

import re
from collections.abc import Mapping

from pals_jax.training.plan.hlo import Operation, Program

# The first pattern that is found in "NAME OPCODE SCOPE" of an operation decides.
_PARTS = {
    "casts": r"^(dynamic-slice_)?convert(_element_type|_fusion)* ",
    "slices and copies": r" (copy|slice|broadcast|transpose|reshape) "
    r"|/(dynamic_slice|dynamic_update_slice|broadcast_in_dim|concatenate|slice|pad)$",
    "optimiser": r"optimizer/",
    "adapters": r"/adapters/",
    "embeddings": r"/embeddings|vocabulary",
    "attention, products": r"/(cross_)?attention/.*dot_general$",
    "attention, the rest": r"/(cross_)?attention/",
    "feed-forward": r"/ffn/",
    "layer norms and sums": r"_norm/|/Layer\.residual/",
    "heads and loss": r"jvp\(",
    "the rest": r"",
}
PARTS = tuple(_PARTS)


def by_part(program: Program) -> Mapping[str, int]:
    """The estimated cycles of each of `PARTS`, of one run of a program, exchanges excluded.

    Empty if the compiler estimates nothing.
    """
    if not program.operations:
        return {}
    cycles = dict.fromkeys(PARTS, 0)
    for operation in program.operations:
        cycles[part(operation)] += operation.cycles
    return cycles


def part(operation: Operation) -> str:
    """The part of a step that an operation belongs to, one of `PARTS`."""
    text = f"{operation.name} {operation.opcode} {operation.scope}"
    return next(part for part, pattern in _PARTS.items() if re.search(pattern, text))
