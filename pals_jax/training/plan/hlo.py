"""Cost of a compiled program: operations, memory traffic and communication, loops included.

XLA's cost analysis counts the body of a loop once, however often it runs, and the encoder's layers
are a loop. This module runs the same analysis on each loop body as a separate program, and
multiplies the result by the trip count.

Everything that depends on private parts of jaxlib or on the text of HLO is here; a test in
tests/test_plan.py names the part that a new version changed.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

# Private, because the public cost_analysis() accepts only whole programs.
from jaxlib import _hlo, _jax  # type: ignore[attr-defined]

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_LOOP = re.compile(r" while\(%([\w.-]+)\), condition=%([\w.-]+), body=%([\w.-]+)(.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations)=\{?(%[^,}\s]+(?:, %[^,}\s]+)*)"
)
# Collectives; only the first instruction of an asynchronous pair is counted.
_EXCHANGE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# Transfers to and from the host, callbacks, and buffers in its memory (space 5).
_HOST = re.compile(r" (?:infeed|outfeed)\(|is_host_transfer=true|_callback\"|S\(5\)")
# An instruction with the cycles that libtpu estimates for running it once.
_ESTIMATED = re.compile(
    r"^ *(?:ROOT )?%([\w.-]+) = .*?[ )]([a-z][\w-]*)\((.*)\"estimated_cycles\":\"(\d+)\"", re.M
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Operation(NamedTuple):
    """An instruction of a program, usually many fused into one.

    Attributes:
        name: its name, without its number; the compiler names a fusion after what it contains.
        opcode: "fusion", "copy", ...
        scope: JAX's name of the operation with those of the modules and transformations around it,
            separated by slashes; empty for what the compiler added.
        cycles: the compiler's estimate for all its runs.
    """

    name: str
    opcode: str
    scope: str
    cycles: int


@dataclasses.dataclass(frozen=True)
class Program:
    """The cost of running a program once, on one device.

    Attributes:
        flops: operations as XLA counts them: matrix products and elementwise operations.
        bytes_moved: bytes of operands and results of every fused operation, as XLA counts them.
        exchanges: for each kind of collective ("all-reduce", ...), its count and the bytes of its
            results.
        host_transfers: the number of instructions that transfer data to or from the host.
        operations: those for which the compiler estimates cycles; compilers other than libtpu
            estimate none. Exchanges and copies that overlap with other work are not among them.
    """

    flops: float
    bytes_moved: float
    exchanges: Mapping[str, tuple[int, int]]
    host_transfers: int
    operations: tuple[Operation, ...]


def read(text: str) -> Program:
    """The cost of the program with the optimised HLO `text`, from `compiled.as_text()`.

    Raises:
        ValueError: if the trip count of a loop cannot be determined.
    """
    found = _COMPUTATION.findall(text)
    computations = {name: body for _, name, body in found}
    entry = next(name for is_entry, name, _ in found if is_entry)
    flops, bytes_moved = _cost(text, entry)
    exchanges: dict[str, tuple[int, int]] = {}
    host_transfers = 0
    operations: list[Operation] = []
    for name, runs in _runs(computations, entry):
        for loop in _LOOP.finditer(computations[name]):
            again = runs * (_trips(computations, name, loop) - 1)
            more = _cost(text, loop[3])
            flops, bytes_moved = flops + again * more[0], bytes_moved + again * more[1]
        for shape, kind in _EXCHANGE.findall(computations[name]):
            number, size = exchanges.get(kind, (0, 0))
            exchanges[kind] = number + runs, size + runs * _size(shape)
        host_transfers += runs * len(_HOST.findall(computations[name]))
        operations += _operations(computations[name], runs)
    return Program(flops, bytes_moved, exchanges, host_transfers, tuple(operations))


def _operations(computation: str, runs: int) -> Iterator[Operation]:
    """The instructions of a computation that have an estimate, in all its runs."""
    for name, opcode, rest, cycles in _ESTIMATED.findall(computation):
        scope = _OP_NAME.search(rest)
        plain = re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", name)
        yield Operation(plain, opcode, scope[1] if scope else "", runs * int(cycles))


def _runs(computations: Mapping[str, str], name: str, runs: int = 1) -> Iterator[tuple[str, int]]:
    """Each computation reachable from `name`, with the number of times it runs."""
    yield name, runs
    for loop in _LOOP.finditer(computations[name]):
        yield from _runs(computations, loop[3], runs * _trips(computations, name, loop))
    for called in _CALLED.findall(computations[name]):
        for callee in called.replace("%", "").split(", "):
            yield from _runs(computations, callee, runs)


def _trips(computations: Mapping[str, str], name: str, loop: re.Match[str]) -> int:
    """The trip count of a loop: its annotation, or the difference of its constant bounds."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop[4]):
        return int(known[1])
    # The TPU compiler drops the annotation.
    before, condition = computations[name], computations[loop[2]]
    test = re.search(r"ROOT .* compare\(%([\w.-]+), %([\w.-]+)\), direction=LT", condition)
    if test:
        place = re.search(r" get-tuple-element\(.*index=(\d+)", _definition(condition, test[1]))
        initial = re.findall(r"%([\w.-]+)", _definition(before, loop[1]).split(" tuple(")[-1])
        start = _constant(before, initial[int(place[1])]) if place else None
        stop = _constant(condition, test[2])
        if start is not None and stop is not None:
            return stop - start
    raise ValueError(f"the loop of {loop[3]} does not say how often it runs.")


def _definition(computation: str, name: str) -> str:
    """The rest of the line on which an instruction is defined."""
    found = re.search(rf"%{re.escape(name)} = (.*)", computation)
    return found[1] if found else ""


def _constant(computation: str, name: str) -> int | None:
    """The value of a scalar that is a constant, or a copy of one."""
    line = _definition(computation, name)
    if copied := re.search(r" copy\(%([\w.-]+)\)", line):
        return _constant(computation, copied[1])
    value = re.search(r" constant\((-?\d+)\)", line)
    return int(value[1]) if value else None


def _cost(text: str, name: str) -> tuple[float, float]:
    """XLA's count of operations and bytes of one computation, loops counted once."""
    computations = text[text.index("\n\n") :].replace("\nENTRY %", "\n%")
    program = "HloModule part" + computations.replace(f"\n%{name} (", f"\nENTRY %{name} (")
    client = jax.devices("cpu")[0].client
    costs = _jax.hlo_module_cost_analysis(client, _hlo.hlo_module_from_text(program))
    return costs.get("flops", 0.0), costs.get("bytes accessed", 0.0)


def _size(shape: str) -> int:
    """Bytes of the arrays of a shape such as (f32[2,3]{1,0}, bf16[4]{0}), without padding."""
    return sum(
        math.prod(int(n) for n in sizes.split(",") if n) * int(bits or 8) // 8
        for _, bits, sizes in _ARRAY.findall(shape)
    )
