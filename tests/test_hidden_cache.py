"""The hidden-state cache: steps from cached states equal steps that compute the states."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree
from safetensors.numpy import load_file, save_file
from test_distributed import assert_one_run, ends, start
from test_train import arguments, checkpoint, lines

from pals_jax.cli import main
from pals_jax.data.batches import TrainBatches, sizes
from pals_jax.data.packing import Packed, Padded
from pals_jax.data.sampler import Draw
from pals_jax.data.tasks import known_task
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment.config import default
from pals_jax.experiment.experiment import Experiment
from pals_jax.experiment.optim import make_optimizer
from pals_jax.inference import hidden_cache
from pals_jax.inference.hidden_cache import HiddenCache, with_hidden
from pals_jax.models.bert import Embeddings
from pals_jax.models.encoder import Encoder, layers_below
from pals_jax.models.shapes import adapter_shapes
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel
from pals_jax.runtime.shards import Shards
from pals_jax.training import train
from pals_jax.training.plan import flops, plan
from pals_jax.training.step import create_state, make_train_step

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
FINAL = "pals(size=6, heads=3, layers='final_half')"
# Methods and how many of the three layers lie below what they change.
METHODS = {
    FINAL: 2,
    "pals(size=6, heads=3, layers=(1,)) + pooler()": 1,
    "houlsby(size=5, norms=False, layers=(-1,))": 2,
    "top_layers(count=1)": 2,
    "top_attention(size=6, blocks=2, heads=2)": 3,
    "top_layer()": 3,
    "pooler()": 3,
    "shared": 3,
}
MIXED, SINGLE = [2, 0, 2, 1], [1]


def experiment(cache_dir: Path, method: str = FINAL, **changes: Any) -> Experiment:
    """Three tasks with a method on a tiny frozen encoder, whose tokens and states lie there."""
    config = default()
    config.method, config.trainable, config.lower_dropout = method, ("adapters/",), False
    config.update({"eval_batch_size": 4, "data": {"max_length": 9, "cache_dir": str(cache_dir)}})
    config.update(changes)
    tasks = tuple(map(known_task, ("sst2", "stsb", "mnli")))
    return Experiment(config, tasks, tiny.config(**DROPOUT))


def split(seed: int = 0) -> TokenizedSplit:
    """Eleven examples of 3 to 9 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 10, 11)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(1, 31, offsets[-1]).astype(np.int32)
    return TokenizedSplit(tokens, offsets, lengths - 1, rng.integers(0, 2, 11).astype(np.float32))


@pytest.fixture
def without_lower_dropout(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Turns off the dropout of the lowest layers and of the embeddings, where all is computed."""

    def turn_off(depth: int) -> None:
        scan = Encoder._scan

        def quiet(self: Encoder, layers: Any, h: Any, rows: Any, keys: Any, *where: Any) -> Any:
            *_, stop = where
            return scan(self, layers, h, rows, None if stop <= depth else keys, *where)

        monkeypatch.setattr(Encoder, "_scan", quiet)
        monkeypatch.setattr(Embeddings, "dropout", lambda self, x, rate, places: x)

    return turn_off


# ---------------------------------------------------------------- steps


def trained(it: Experiment, splits: Any, tasks: list[int], devices: int, packing: bool) -> Any:
    """What two steps say, each with all gradients and what they make of the state."""
    parallel, model = DataParallel.over(jax.devices()[:devices]), it.model()
    optimizer = tiny.recording(make_optimizer(tiny.optimizer_config(), 3, tiny.TOTAL_STEPS)[0])
    state = parallel.put(create_state(tiny.variables(model), ("adapters/",), optimizer))
    step = parallel.compile(make_train_step(model, optimizer, 0, parallel.division))
    rng, shards = np.random.default_rng(0), parallel.shards
    shape = len(tasks), 8 // len(tasks)
    draws = [Draw(np.array(tasks, np.int32), rng.integers(0, 11, shape)) for _ in range(2)]
    placing: Padded | Packed = Padded(8, 9, shards.total)
    if packing:
        samples = (sizes(splits, draw) for draw in draws)
        placing = Packed.choose(samples, 1000, 8, 9, 12, shards.total)
    make, seen = TrainBatches(splits, it.layout, placing, shards, 0, 3), []
    for draw in draws:
        batch = make(draw)
        assert (batch.hidden is not None) == (splits[0].hidden is not None)
        state, scalars = step(state, batch)
        seen.append(jax.device_get((scalars, state.trainable, state.opt_state)))
    return seen


@pytest.mark.parametrize(
    ("method", "tasks", "where"),
    [
        pytest.param(FINAL, MIXED, [(2, True)], marks=pytest.mark.slow),
        pytest.param(FINAL, SINGLE, [(1, True), (2, False)], marks=pytest.mark.nightly),
        *(pytest.param(name, MIXED, [(1, True)], marks=pytest.mark.nightly) for name in METHODS),
    ],
)
def test_a_step_that_begins_above_is_the_whole_step(
    method: str,
    tasks: list[int],
    where: list[tuple[int, bool]],
    tmp_path: Path,
    without_lower_dropout: Callable[[int], None],
) -> None:
    """Loss, every gradient, moments and parameters; above there is dropout."""
    it, splits = experiment(tmp_path, method), [split(seed) for seed in range(3)]
    kept = with_hidden(it, tiny.variables(it.model()), splits)
    above = [trained(it, kept, tasks, devices, packing) for devices, packing in where]
    without_lower_dropout(METHODS[method])
    whole = ravel_pytree(trained(it, splits, tasks, 1, packing=False))[0]
    for each in above:
        np.testing.assert_allclose(ravel_pytree(each)[0], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_below(method: str, tmp_path: Path) -> None:
    assert layers_below(adapter_shapes(experiment(tmp_path, method).model())) == METHODS[method]


# ---------------------------------------------------------------- what is kept


def test_hidden_states_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And again only for other texts, other weights below, or another dtype."""
    written: list[Path] = []
    write = HiddenCache.write
    monkeypatch.setattr(
        HiddenCache, "write", lambda self, missing: written.extend(missing) or write(self, missing)
    )
    it = experiment(tmp_path)
    variables, text = tiny.variables(it.model()), split()
    first = with_hidden(it, variables, {"train": text, "dev": {"dev": text, "other": split(1)}})
    assert len(written) == 2
    assert "hidden states of the lowest 2 of 3 layers are computed once" in capsys.readouterr().err
    hidden = first["train"].hidden
    assert (hidden.shape, hidden.dtype) == ((len(text.tokens), 12), np.float32)
    np.testing.assert_array_equal(first["dev"]["dev"].hidden, hidden)
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert sum(file.stat().st_size for file in written) == 48 * (
        len(text.tokens) + len(split(1).tokens)
    )

    def changed(path: Any, x: jax.Array) -> jax.Array:
        if "'encoder'" not in str(path) or "pooler" in str(path):
            return x + 1
        return x.at[-1].add(1) if "layers" in str(path) else x

    above = jax.tree_util.tree_map_with_path(changed, variables)
    np.testing.assert_array_equal(with_hidden(it, above, text).hidden, hidden)
    assert len(written) == 2
    other = jax.tree.map(lambda x: x + 0.1, variables)
    assert abs(with_hidden(it, other, text).hidden - hidden).max() > 1e-3
    assert len(written) == 3
    half = with_hidden(experiment(tmp_path, dtype="bfloat16"), variables, text).hidden
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), hidden, rtol=0, atol=0.1)
    assert len(written) == 4


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if when == "before":
        usage = type("usage", (), {"free": 100})
        monkeypatch.setattr(hidden_cache.shutil, "disk_usage", lambda path: usage)
    else:

        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(HiddenCache, "_compute", fail)
    it = experiment(tmp_path)
    with pytest.raises(UserError, match=r"cannot write 0.00 MiB .* No space left on device; make"):
        with_hidden(it, tiny.variables(it.model()), split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainable": ("params/", "adapters/")}, "but the encoder is trained"),
        ({"method": "houlsby(size=4, layers=(-1,))"}, "no layer below its layer_norms that"),
        ({"method": "prompt_tuning(length=2) + pooler()"}, "no layer below its prompt that"),
        ({"method": "lora(rank=2)"}, "no layer below its lora_query, lora_value that"),
    ],
)
def test_where_there_is_nothing_to_keep(
    overrides: dict[str, Any], message: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"trainable": ("adapters/",), "lower_dropout": False} | overrides
    given = [f"--config.{key}={value}" for key, value in changes.items()]
    assert main(arguments(small, small / "run", *given)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (small / "run").exists()


# ---------------------------------------------------------------- runs

ABOVE = (
    "--config.trainable=('adapters/',)",
    "--config.method=pals(size=12, heads=3, layers='final_half')",
    "--config.lower_dropout=False",
)


def assert_same_run(mine: Path, other: Path) -> None:
    """Checkpoint and metrics to 1e-5."""
    (step, ours), (last, theirs) = checkpoint(mine), checkpoint(other)
    assert (step, ours.keys()) == (last, theirs.keys())
    for key, x in ours.items():
        np.testing.assert_allclose(x, theirs[key], rtol=0, atol=1e-5, err_msg=key)
    for x, y in zip(lines(mine), lines(other), strict=True):
        assert x | {"examples_per_second": 0} == pytest.approx(
            y | {"examples_per_second": 0}, abs=1e-5
        )


@pytest.mark.slow
def test_a_run_begins_above(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its dev scores are those of the whole model, which `evaluate` computes."""
    given = *ABOVE, "--config.tasks=('colour',)", "--config.epochs=1"
    assert main(arguments(small, small / "run", *given)) == 0
    assert len(list((small / "cache").glob("*.hidden"))) == 1  # train and dev are one file
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={small / 'run'}", "--json"]) == 0
    results = flatten_dict(json.loads(capsys.readouterr().out)["results"], sep="/")
    (evaluation,) = (line for line in lines(small / "run") if "score" in line)
    assert evaluation.items() >= results.items()


@pytest.mark.slow
def test_going_on_with_another_encoder(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose hidden states are not those that the run began with."""
    given = *ABOVE, "--config.tasks=('colour',)"
    assert main(arguments(small, small / "run", *given, "--config.epochs=1")) == 0
    shutil.copytree(small / "encoder", small / "other")
    weights = load_file(small / "other" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.output.dense.weight"))
    save_file(weights | {name: weights[name] + 0.5}, small / "other" / "model.safetensors")
    before = checkpoint(small / "run")
    capsys.readouterr()
    elsewhere = f"--config.encoder={small / 'other'}"
    assert main([*arguments(small, small / "run", *given, "--config.epochs=1"), elsewhere]) == 2
    assert f"{small / 'other'} is not the encoder that the run began" in capsys.readouterr().err
    np.testing.assert_equal(checkpoint(small / "run"), before)


@pytest.mark.slow
def test_told_to_stop_before_the_first_step(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was being computed is not left behind."""

    def stop(self: HiddenCache, split: TokenizedSplit, file: BinaryIO, bar: Any) -> None:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(HiddenCache, "_compute", stop)
    with pytest.raises(SystemExit, match="143"):
        main(arguments(small, small / "run", *ABOVE))
    assert not list((small / "cache").glob("building-*"))
    assert not list((small / "cache").glob("*.hidden"))


@pytest.mark.parametrize(
    "groups", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.nightly)]
)
def test_a_run_that_begins_above_is_the_whole_run(
    groups: int,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_lower_dropout: Callable[[int], None],
) -> None:
    given = *ABOVE, f"--config.groups={groups}", "--config.epochs=1"
    assert main(arguments(small, small / "above", *given)) == 0
    monkeypatch.setattr(train, "with_hidden", lambda experiment, variables, splits: splits)
    without_lower_dropout(1)
    assert main(arguments(small, small / "whole", *given)) == 0
    assert_same_run(small / "above", small / "whole")


@pytest.mark.nightly
@pytest.mark.parametrize("seeds", [(0, 0), (1, 2)], ids=["one seed", "two seeds"])
def test_runs_of_one_step(seeds: tuple[int, int], small: Path) -> None:
    """Those of a sweep are what each is alone."""
    pairs = zip(seeds, (1e-3, 1e-2), strict=True)
    runs = [{"seed": seed, "optimizer.learning_rate": rate} for seed, rate in pairs]
    command = [*arguments(small, small / "sweep", *ABOVE), "--sweep"]
    assert main([*command, f"--config.sweep={tuple(runs)}"]) == 0
    for run in runs:
        name = f"seed={run['seed']},learning_rate={run['optimizer.learning_rate']}"
        changes = [f"--config.{key}={value}" for key, value in run.items()]
        assert main(arguments(small, small / name, *ABOVE, *changes)) == 0
        assert_same_run(small / "sweep" / name, small / name)


@pytest.mark.slow
def test_tasks_that_are_added_to_a_run(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They begin above the same layers, with what was kept for the run; its own tasks stay."""
    first = *ABOVE, "--config.tasks=('colour','same')"
    assert main(arguments(small, small / "old", *first)) == 0
    kept = set((small / "cache").glob("*.hidden"))
    later = *ABOVE, "--config.tasks=('share',)", f"--base={small / 'old'}"
    assert main(arguments(small, small / "new", *later)) == 0
    assert len(set((small / "cache").glob("*.hidden")) - kept) == 1
    capsys.readouterr()
    for run in ("old", "new"):
        predict = [f"--workdir={small / run}", "--task=colour", f"--input={small / 'colour.tsv'}"]
        assert main(["predict", *predict]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[: len(out) // 2] == out[len(out) // 2 :]


@pytest.mark.nightly
def test_several_hosts(small: Path) -> None:
    """Each keeps what it needs, and the run is that of one."""
    assert main(arguments(small, small / "whole", *ABOVE)) == 0
    for path in (small / "cache").glob("*.hidden"):
        path.unlink()
    assert ends(start(small, small / "hosts", 2, *ABOVE)) == [0, 0]
    assert len(list((small / "cache").iterdir())) == 6
    assert_one_run(small / "hosts", small / "whole")


# ---------------------------------------------------------------- plans


def test_the_model_has_no_products_below(tmp_path: Path) -> None:
    """Heads alone are a pooler and a head; nothing of the kind is allocated for a plan."""
    it = experiment(tmp_path, "shared")
    pooler, head = 2 * 12 * 12, 2 * 12 * 3
    assert flops.forward(it.model(), 7, kept=True) == pooler + head
    assert flops.training(it.model(), ("adapters/",), 7, kept=True) == pooler + 2 * head
    batch, _ = plan._eval_batch(it, Shards())
    assert batch.hidden.shape == (1, 4, 9, 12)
    it.config.lower_dropout = True
    assert plan._eval_batch(it, Shards())[0].hidden is None
