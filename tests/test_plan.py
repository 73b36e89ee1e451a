"""The plan: figures of the whole step, compiled for CPUs and, with libtpu, for TPUs."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from pals_jax.cli import main
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.optim import make_optimizer
from pals_jax.models.adapters import methods
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.runtime.compile_cache import keep_compiled
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel
from pals_jax.training.plan import flops, hlo, tpus
from pals_jax.training.plan.ahead_of_time import compile_step, no_compilation_cache
from pals_jax.training.plan.breakdown import by_part
from pals_jax.training.plan.plan import Plan, plan
from pals_jax.training.step import create_state, make_train_step

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = Path(__file__).with_name("tiny_experiment.py")
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))
FOUR_CHIPS = ("v2-8", "v3-8", "v4-8", "v5litepod-4", "v6e-4")
# What the plain step below takes to compile in the hour in which v4's step takes 16 s, going by
# their ratio in another hour (5.6 to 41).
PLAIN_SECONDS = 2.2


@pytest.fixture
def libtpu() -> Iterator[None]:
    """The compiler for TPUs, whose programs this machine could not read from the cache."""
    pytest.importorskip("libtpu", reason='needs the compiler for TPUs: pip install "jax[tpu]"')
    with no_compilation_cache():
        yield


# ---------------------------------------------------------------- the model's own operations

L, D, F, N, C = 128, 768, 3072, 12, 3  # BERT-base
DENSE, ATTENTION = 2 * L * (4 * D * D + 2 * D * F), 4 * L * L * D  # of a layer
POOLER, HEAD = 2 * D * D, 2 * D * C


def test_products_are_those_of_the_formula():
    """BERT-base with PALs; a gradient takes twice the forward pass, however it is computed."""
    S = 204
    pal = 2 * L * (2 * D * S + 3 * S * S) + 4 * L * L * S
    model = MultiTaskModel(BertConfig(), (2, C), methods.pals(S), remat=True)
    forward = N * (DENSE + ATTENTION + pal) + POOLER + HEAD
    assert flops.forward(model, L) == forward
    assert flops.training(model, ("params/", "adapters/"), L) == 3 * forward


def test_what_is_frozen_needs_no_gradient():
    S = 8
    adapters = 2 * 2 * L * 2 * D * S
    model = MultiTaskModel(BertConfig(), (C,), methods.houlsby(S))
    forward = N * (DENSE + ATTENTION + adapters) + POOLER + HEAD
    # Attention multiplies two things that depend on adapters below; elsewhere one is frozen.
    backward = N * (DENSE + 2 * ATTENTION + 2 * adapters) + POOLER + 2 * HEAD
    assert flops.training(model, ("adapters/",), L) == forward + backward


# ---------------------------------------------------------------- programs, compiled for the CPU


def read(function: Callable[..., Any], *arguments: Any) -> hlo.Program:
    return hlo.read(jax.jit(function).lower(*arguments).compile().as_text())


def test_what_a_new_jaxlib_changed():
    """`hlo` reads private functions and the text of programs; each failure names what is gone."""
    for module, name in (
        (hlo._hlo, "hlo_module_from_text"),
        (hlo._jax, "hlo_module_cost_analysis"),
    ):
        assert hasattr(module, name), f"jaxlib has no {module.__name__}.{name} any more"
    x = jnp.ones((32, 32))
    loop = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0])
    text = loop.lower(x).compile().as_text()
    entries = [name for entry, name, _ in hlo._COMPUTATION.findall(text) if entry]
    assert len(entries) == 1, "the text of a program marks its computations in another way"
    assert hlo._LOOP.search(text), "the text of a program writes loops in another way"
    assert "known_trip_count" in text, "loops are no longer annotated with their trip count"
    costs = hlo._cost(text, entries[0])
    assert all(costs), "the cost analysis has other names for operations and bytes"


def test_loops_within_loops_are_counted_as_often_as_they_run():
    x, product = jnp.ones((32, 32)), 2 * 32**3

    def inner(x: Any, _: Any) -> tuple[Any, None]:
        return x @ x, None

    def outer(x: Any, _: Any) -> tuple[Any, None]:
        return jax.lax.scan(inner, x @ x, length=5)[0], None

    def nested(x: Any) -> Any:
        return jax.lax.scan(outer, x @ x, length=3)[0]

    program = read(nested, x)
    products = 1 + 3 * (1 + 5)
    assert products * product <= program.flops < 1.01 * products * product
    assert program.bytes_moved >= products * 3 * x.nbytes
    assert program.host_transfers == 0


def test_a_loop_without_bounds_is_refused():
    def endless(x: Any) -> Any:
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="how often"):
        read(endless, jnp.ones((3, 3)))


def test_exchanges_between_devices_are_counted():
    def step(x: Any) -> Any:
        return jax.lax.psum(x, "i"), jax.lax.all_gather(x, "i")

    compiled = jax.pmap(step, "i").lower(jnp.ones((8, 4), jnp.bfloat16)).compile()
    exchanges = hlo.read(compiled.as_text()).exchanges
    assert exchanges.keys() == {"all-reduce", "all-gather"}
    assert exchanges["all-gather"] == (1, 8 * exchanges["all-reduce"][1])


def test_no_program_for_devices_elsewhere_is_cached(cache: Path):
    """JAX would write it, and could not read it when the same step is compiled again."""
    x = np.ones((4, 4), np.float32)
    compile_step(jax.jit(lambda state, batch: state @ batch), x, x)
    assert not list(cache.iterdir())
    jax.jit(lambda x: x @ x).lower(x).compile()
    assert list(cache.iterdir()), "the cache is in use again"


def test_what_is_compiled_is_kept_where_jax_was_not_told_otherwise(cache: Path, tmp_path: Path):
    keep_compiled(tmp_path / "elsewhere")
    assert jax.config.values["jax_compilation_cache_dir"] == str(cache)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    keep_compiled(tmp_path / "elsewhere")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "elsewhere/compiled")
    jax.jit(lambda x: x + 1).lower(np.ones(3)).compile()
    assert list((tmp_path / "elsewhere/compiled").iterdir()), "small programs are kept, too"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty cache for compiled programs, of any compilation time."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_callbacks_are_found():
    def step(x: Any) -> Any:
        jax.debug.callback(lambda x: None, x)
        return x

    assert read(step, jnp.ones(3)).host_transfers > 0


# ---------------------------------------------------------------- the kinds of TPU


def test_the_kinds_are_those_that_can_be_launched():
    table = (REPOSITORY / "launch" / "common.sh").read_text().split('\nkinds="\n')[1].split('"')[0]
    launched = {}
    for line in table.strip().splitlines():
        name, _, *numbers = line.split()
        launched[name] = [int(number) for number in numbers]
    hosts = {name: kind.chips // (kind.host[0] * kind.host[1]) for name, kind in tpus.KINDS.items()}
    assert launched == {
        name: [kind.chips, kind.devices, hosts[name]] for name, kind in tpus.KINDS.items()
    }


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("name", tpus.KINDS)
def test_the_compiler_knows_every_kind(name: str):
    kind = tpus.KINDS[name]
    devices = kind.compile_devices()
    assert len(devices) == kind.devices
    assert len({device.process_index for device in devices}) == kind.chips // (
        kind.host[0] * kind.host[1]
    )


def test_without_the_compiler(small, capsys, monkeypatch):
    monkeypatch.setattr(tpus.importlib.util, "find_spec", lambda name: None)
    command = ["plan", f"--config={CONFIG}:{small}", "--topology"]
    assert main([*command, "v3-8"]) == 2
    assert 'pip install "jax[tpu]"' in capsys.readouterr().err
    assert main([*command, "v9-8"]) == 2
    assert "v9-8; known are v2-8, v3-8" in capsys.readouterr().err


# ---------------------------------------------------------------- programs, compiled for TPUs


def tpu_step() -> Any:
    """A training step for a v3-8 of a model small enough to be unrolled, before compilation."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    config = tiny.config(num_hidden_layers=4, max_position_embeddings=32, **sizes)
    model = MultiTaskModel(config, tiny.NUM_OUTPUTS, methods.pals(24))
    optimizer, _ = make_optimizer(tiny.optimizer_config(), 3, tiny.TOTAL_STEPS)
    rules = ("params/", "adapters/")
    parallel = DataParallel.over(tpus.KINDS["v3-8"].compile_devices())

    def first_state() -> Any:
        return create_state(init_variables(model, jax.random.key(0)), rules, optimizer)

    tokens = dict.fromkeys(
        ("input_ids", "token_type_ids", "attention_mask"), np.zeros((4, 32), np.int32)
    )
    rows = tiny.batch([0], rows=4).replace(**tokens)
    batch = jax.tree.map(lambda x: np.stack([x] * 8), rows)
    step = make_train_step(model, optimizer, 0, parallel.division)
    return parallel.compile(step, donate=True).lower(jax.eval_shape(first_state), batch)


@pytest.mark.optimized  # two compilations
@pytest.mark.usefixtures("libtpu")
def test_a_scanned_step_counts_as_much_as_the_same_unrolled(monkeypatch: pytest.MonkeyPatch):
    """Where XLA's own figure for the scanned step is a fraction of it."""
    compiled = tpu_step().compile()
    scanned = hlo.read(compiled.as_text())
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    unrolled = tpu_step().compile()
    flops = unrolled.cost_analysis()["flops"]
    assert " while(" not in unrolled.as_text()
    assert hlo.read(unrolled.as_text()).flops == pytest.approx(flops, rel=1e-4)
    assert scanned.flops == pytest.approx(flops, rel=0.02)
    assert compiled.cost_analysis()["flops"] < 0.5 * flops
    # Without loops, every instruction runs once, and the sum of what is written is the whole.
    written = map(int, re.findall(r'"estimated_cycles":"(\d+)"', unrolled.as_text()))
    cycles = sum(by_part(hlo.read(unrolled.as_text())).values())
    assert cycles == sum(written) > 0
    assert sum(by_part(scanned).values()) == pytest.approx(cycles, rel=0.2)


@pytest.mark.usefixtures("libtpu")
def test_transfers_to_the_host_are_found():
    def step(state: Any, batch: Any) -> Any:
        jax.debug.callback(lambda x: None, batch)
        return state

    parallel = DataParallel.over(tpus.KINDS["v3-8"].compile_devices())
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    compiled = parallel.compile(step).lower(x, x).compile()
    assert hlo.read(compiled.as_text()).host_transfers > 0


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_the_command(small: Path, capsys: pytest.CaptureFixture[str]):
    """Figures that follow from others, of the real steps of a tiny experiment on four hosts."""
    command = ["plan", f"--config={CONFIG}:{small}", "--topology=v3-32", "--price=32"]
    command += ["--config.epochs=2", "--config.steps_per_epoch=40", "--config.method=shared"]
    command.append(f"--plot={(picture := small / 'parts.png')}")
    assert main([*command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (planned["chips"], planned["devices"], planned["steps"]) == (16, 32, 80)
    step = planned["train"]
    assert (step["examples"], step["rows"]) == (8, 32)  # packed, but on so many devices
    assert step["length"] in (4, 8, 12, 16)
    assert step["host_transfers"] == planned["evaluation"]["host_transfers"] == 0
    assert 0 < step["exchanges"]["all-reduce"]["count"] <= 6
    assert 0.5 < planned["mean_batch"] < 2.0
    assert planned["hours"] == pytest.approx(80 * step["seconds"] * planned["mean_batch"] / 3600)
    assert planned["usd"] == pytest.approx(32 * planned["hours"])
    cycles, seconds = step["cycles_by_part"], step["seconds_by_part"]
    assert cycles["optimiser"] > 0
    assert sum(seconds.values()) == pytest.approx(
        sum(cycles.values()) / 940e6 + step["seconds_exchanging"]
    )
    assert step["seconds"] == max(step["seconds_roofline"], sum(seconds.values()))
    assert planned["fits"]


def planned(config: object, topology: str, *overrides: str) -> Plan:
    loaded = config_lib.load([f"--config={config}", *overrides])
    return plan(Experiment.from_config(loaded), topology)


def assert_good(plan: Plan) -> None:
    """It fits, computes little but the model, and speaks rarely."""
    assert plan.fits
    assert 1.0 <= plan.train.flops / plan.train.model_flops <= 1.10
    assert plan.train.program.exchanges.keys() <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert plan.train.program.exchanges["all-reduce"][0] <= 6
    assert plan.train.program.host_transfers == plan.evaluation.program.host_transfers == 0


def seconds_of_a_plain_step() -> float:
    """What this machine now takes to compile a program that never changes: the same has taken
    2.5 times as long in one hour as in another.
    """
    device = tpus.KINDS["v2-8"].compile_devices()[0]

    def loss(layers: Any, x: Any) -> Any:
        for query, key, value, inner, outer in layers:
            scores = jax.nn.softmax((x @ query) @ (x @ key).swapaxes(-1, -2))
            x = x + scores @ (x @ value)
            x = x + jax.nn.gelu(x @ inner) @ outer
        return jnp.sum(x * x)

    step = jax.jit(jax.grad(loss), in_shardings=jax.sharding.SingleDeviceSharding(device))
    shapes = [(D, D)] * 3 + [(D, F), (F, D)]
    layers = [[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]] * 4
    return compile_step(step, layers, jax.ShapeDtypeStruct((8, L, D), jnp.float32)).seconds


@pytest.mark.optimized
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("topology", FOUR_CHIPS)
def test_a_step_of_bert_base(topology: str):
    """It compiles in 30 s on two cores, in an hour in which the plain step takes PLAIN_SECONDS."""
    before = seconds_of_a_plain_step()
    glue = planned(REPOSITORY / "configs" / "pals_glue.py", topology)
    assert_good(glue)
    slower = max(before, seconds_of_a_plain_step()) / PLAIN_SECONDS  # as other work comes and goes
    assert glue.train.compiled.seconds <= 30 * max(1.0, slower)


@pytest.mark.optimized  # two compilations
@pytest.mark.usefixtures("libtpu")
def test_packing_leaves_a_third_of_the_operations(
    shared: Path, gte_small: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the mix of GLUE, over all batches of the paper's run, whose batches are 32 rows of 128."""
    here = (f"encoder={gte_small}", f"data.dir={shared / 'glue'}", "data.source=glue_dir")
    overrides = [f"--config.{override}" for override in here]
    packed = planned(REPOSITORY / "configs" / "pals_glue.py", "v3-8", *overrides)
    monkeypatch.setattr("pals_jax.training.plan.plan._training_data", lambda experiment: None)
    padded = planned(REPOSITORY / "configs" / "pals_glue.py", "v3-8", *overrides)
    assert (padded.train.shape, padded.mean_batch) == ((32, 128), 1.0)
    assert packed.train.flops * packed.mean_batch <= 0.35 * padded.train.flops


@pytest.mark.optimized
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    "config",
    [path for path in CONFIGS if path.stem != "pals_glue"],  # whose kinds are all above
    ids=lambda path: path.stem,
)
def test_every_other_configuration(config: Path, minilm: Path, shared: Path):
    argument = f":{shared / 'extra_tasks'}" if config.stem == "houlsby_extra" else ""
    overrides = ["--config.batch_size=112"] if config.stem == "unified_enro" else []
    assert_good(planned(f"{config}{argument}", "v3-8", *overrides))


def test_the_tables_have_every_configuration():
    page = (REPOSITORY / "docs" / "plan.md").read_text()
    for config in CONFIGS:
        rows = re.findall(rf"^\| {config.stem} \| (.*) \|$", page, re.MULTILINE)
        assert [row.split(" | ")[0] for row in rows] == list(FOUR_CHIPS)
        parts = dict(re.findall(rf"^\| {config.stem} on (\S+) \| (.*) \|$", page, re.MULTILINE))
        for row in rows:
            kind, _, memory, _, share, host_transfers, roofline, step, *_ = row.split(" | ")
            used, _, hbm, _ = memory.split()
            assert float(used) < float(hbm)
            assert 1 / 1.10 < float(share.rstrip("%")) / 100 <= 1.0
            assert host_transfers == "0"
            roofline, step = (float(time.removesuffix(" ms")) for time in (roofline, step))
            assert (kind in parts) == (kind != "v6e-4")
            total = sum(map(float, parts[kind].split(" | "))) if kind in parts else roofline
            assert step == pytest.approx(total, rel=0.01, abs=0.06)
            assert step >= roofline


@pytest.mark.usefixtures("libtpu")
def test_what_does_not_fit():
    parallel = DataParallel.over(tpus.KINDS["v5litepod-4"].compile_devices())
    step = parallel.compile(lambda state, batch: state + 1)
    with pytest.raises(UserError, match=r"needs 1\d\.\d+G of the 15\.\d+G .* lower batch_size"):
        compile_step(step, jax.ShapeDtypeStruct((2**31, 1), jnp.float32), np.zeros((4, 1)))
