"""The compiler's estimate of a step's cycles: its parts, and its time."""

import dataclasses
import json
from pathlib import Path

import pytest
from test_plan import REPOSITORY, planned

from pals_jax.convert.huggingface import architecture
from pals_jax.data.packing import Shape
from pals_jax.training.plan import hlo, tpus
from pals_jax.training.plan.ahead_of_time import Compiled
from pals_jax.training.plan.breakdown import PARTS, part
from pals_jax.training.plan.plan import StepEstimate

LAYER = "jit(f)/jvp(MultiTaskModel)/Encoder/Encoder._scan/while/body/Layer/Layer.residual"


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (("convert", "convert", ""), "casts"),
        (("dynamic-slice_convert_fusion", "fusion", f"{LAYER}/ffn/output"), "casts"),
        (("copy", "copy", f"{LAYER}/attention/transpose"), "slices and copies"),
        (("fusion", "fusion", "jit(f)/while/body/dynamic_slice"), "slices and copies"),
        (("multiply_add_fusion", "fusion", "jit(f)/optimizer/add"), "optimiser"),
        (("fusion", "fusion", f"{LAYER}/attention/adapters/dot_general"), "adapters"),
        (("fusion", "fusion", "jit(f)/Encoder/embeddings/norm/reduce_sum"), "embeddings"),
        (("fusion", "fusion", f"{LAYER}/attention/query/dot_general"), "attention, products"),
        (("fusion", "fusion", f"{LAYER}/attention/reduce_max"), "attention, the rest"),
        (("convert_reduce_fusion", "fusion", f"{LAYER}/ffn/output/dot_general"), "feed-forward"),
        (("fusion", "fusion", f"{LAYER}/ffn_norm/reduce_sum"), "layer norms and sums"),
        (("fusion", "fusion", "transpose(jvp(f))/MultiTaskModel.classify/mul"), "heads and loss"),
        (("fusion", "fusion", ""), "the rest"),
    ],
)
def test_the_part_of_an_operation(operation: tuple[str, str, str], expected: str):
    assert part(hlo.Operation(*operation, cycles=1)) == expected


def test_the_time_is_the_larger_of_roofline_and_estimate():
    """Without a public clock, or without estimates, it is the roofline, and that is said."""

    def step(topology: str, *cycles: int) -> StepEstimate:
        operations = tuple(hlo.Operation("copy", "copy", "", each) for each in cycles)
        program = hlo.Program(1e9, 1e9, {"all-reduce": (1, 10**6)}, 0, operations)
        kind = tpus.KINDS[topology]
        return StepEstimate(kind, 1, Shape(1, 8), 10**9, Compiled(program, 0, 0, 0.0))

    slow, fast = step("v4-8", 10**7, 10**6), step("v4-8", 10)
    exchanging = 2 * 10**6 * (3 / 4) / (2 * 50e9)
    assert slow.seconds == sum(slow.seconds_by_part.values()) == 1.1e7 / 1050e6 + exchanging
    assert [*slow.seconds_by_part] == [*PARTS, "exchanges"]
    assert slow.utilisation == pytest.approx(10**9 / slow.seconds / (4 * 275e12))
    assert fast.seconds == fast.roofline == 1e9 / 1200e9 + exchanging
    for unknown, reason in (
        (step("v6e-4", 10**9), "the clock of v6e is not public"),
        (step("v4-8"), "this libtpu estimates no cycles"),
    ):
        assert (unknown.seconds, unknown.seconds_by_part) == (unknown.roofline, {})
        assert reason in str(unknown.without_estimate)


# Millions of cycles of a training step, with exchanges; docs/plan.md says where from.
CYCLES = {
    ("houlsby_glue", "v3-8"): 26.4,
    ("houlsby_glue", "v4-8"): 21.0,
    ("houlsby_glue", "v5litepod-4"): 33.4,
    ("pals_glue", "v3-8"): 23.1,
    ("pals_glue", "v4-8"): 18.9,
    ("pals_glue", "v5litepod-4"): 30.8,
}


# The same for pals_glue on batches of GLUE that are packed.
PACKED_CYCLES = {"v3-8": 14.1, "v4-8": 11.3, "v5litepod-4": 20.5}
MEMORY = 1.41 * 2**30  # of pals_glue, padded, per chip of a v4-8


def assert_within(step: StepEstimate, millions: float) -> None:
    """The step takes so many cycles, with 5% room."""
    assert step.kind.chip.clock is not None
    cycles = step.kind.chip.clock * sum(step.seconds_by_part.values())
    assert cycles <= 1.05 * 1e6 * millions


@pytest.mark.optimized
@pytest.mark.parametrize(("config", "topology"), CYCLES)
def test_no_change_loses_cycles(config: str, topology: str) -> None:
    pytest.importorskip("libtpu", reason="needs the compiler for TPUs")
    found = planned(REPOSITORY / "configs" / f"{config}.py", topology)
    assert_within(found.train, CYCLES[config, topology])
    if (config, topology) == ("pals_glue", "v4-8"):
        assert found.memory <= 1.03 * MEMORY


@pytest.mark.optimized
@pytest.mark.parametrize("topology", PACKED_CYCLES)
def test_no_change_loses_packed_cycles(
    topology: str, shared: Path, gte_small: Path, tmp_path: Path
) -> None:
    """With the sizes of BERT-base, and a tokenizer of its vocabulary."""
    pytest.importorskip("libtpu", reason="needs the compiler for TPUs")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (tmp_path / name).symlink_to(gte_small / name)
    sizes = dataclasses.asdict(architecture("bert-base-uncased"))
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    overrides = f"encoder={tmp_path}", "data.source=glue_dir", f"data.dir={shared / 'glue'}"
    found = planned(
        REPOSITORY / "configs" / "pals_glue.py", topology, *(f"--config.{x}" for x in overrides)
    )
    assert found.train.shape == (8, 64)
    assert_within(found.train, PACKED_CYCLES[topology])
