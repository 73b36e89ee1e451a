"""Houlsby adapters against `adapters`, LoRA against `peft`: training and inference.

    python benchmarks/adapter_libraries.py --glue=DIR --encoder=DIR --out=DIR

The encoder is frozen. Both sides have an adapter and a head for each task of GLUE, start from the
same weights, and must compute the same losses before they are timed. Ours packs, as `train` and
`evaluate` of `pals-jax` do; the libraries pad to the longest text of a batch, with and without
grouping by length. Inference runs on the dev sets, in each round on a part of another one. The
encoder's matrix products alone, on the texts without any padding, are timed too: their time is a
lower bound for everything that computes this model with such products. Writes
adapter_libraries.json and a plot, and prints the tables of docs/results.md.

On a GPU that both JAX and PyTorch see, it runs in bfloat16 only, compiles the libraries' models
where that works, and adds the model-FLOPs utilisation (of the operations that the texts need
without any padding). --dimensions=base or large takes random weights of BERT-base's or
BERT-large's dimensions. This part has not been run: no GPU was at hand.
"""

import argparse
import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import side_by_side
from glue_mix import Mix
from side_by_side import PEERS, Timing, Worker

from pals_jax.convert import huggingface, tables, tensor_files, to_adapterhub, to_peft
from pals_jax.data.batches import sizes
from pals_jax.data.packing import Packed, Padded, Shape
from pals_jax.data.sampler import Draw
from pals_jax.data.tokenize import load_tokenizer
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel, init_variables
from pals_jax.training.plan import flops

TORCH = "torch==2.13.0"
OURS, TRAINED = "pals_jax", ("adapters/",)
BATCH_SIZE, CHECK, ROUNDS = 32, 3, 5
EVAL_ROWS = 8  # they hold about 28 texts of GLUE
STEPS = {  # in a round
    "cpu": {"inference": 8, "training": 4},
    "gpu": {"inference": 50, "training": 50},
}
DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16",)}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # relative difference of the losses
KINDS = ("inference", "training")
PADDINGS = ("longest", "by length")
BOUND = "products alone"
PEAKS = {"NVIDIA H200": 989.0}  # TFLOP/s in bfloat16, dense


class Library(NamedTuple):
    """A library that ours is compared with.

    Attributes:
        title: the name of the method.
        name: the name of the library.
        requirements: the packages that pip installs into its environment.
        script: the file of its worker in `peers`.
        method: our method that equals the library's default, given the encoder's width.
        write: writes the adapter of a task in the library's format.
    """

    title: str
    name: str
    requirements: list[str]
    script: str
    method: Callable[[int], str]
    write: Callable[[MultiTaskModel, Any, int, Path], None]


LIBRARIES = (
    Library(
        "Houlsby",
        "adapters",
        ["adapters==1.3.0", TORCH],
        "with_adapters.py",
        lambda width: f"houlsby(size={width // 16}, activation='swish', norms=False)",
        to_adapterhub,
    ),
    Library(
        "LoRA",
        "peft",
        ["peft>=0.21,<0.22", TORCH],
        "with_peft.py",
        lambda width: "lora()",
        to_peft,
    ),
)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one kind as one side takes them.

    Attributes:
        draws: one draw for each step.
        splits: the splits that the draws index.
        placing: how examples are placed in rows; None: padded to the longest of the batch.
        together: the number of draws that are regrouped into batches; 0: each draw is a batch.
    """

    draws: Sequence[Draw]
    splits: Sequence[TokenizedSplit]
    placing: Padded | Packed | None = None
    together: int = 0

    def first(self, count: int) -> "Steps":
        """The first `count` steps."""
        return dataclasses.replace(self, draws=self.draws[:count])

    def lengths(self) -> np.ndarray:
        """The lengths of the examples, int64 [steps, B]."""
        return np.stack([sizes(self.splits, draw)[1] for draw in self.draws])

    def positions(self) -> float:
        """The mean number of positions per example, padding included."""
        if self.placing is None:
            return float(self.lengths().max(1).mean())
        return sum(rows * length for rows, length in self._shapes()) / self.lengths().size

    def _shapes(self) -> Iterator[Shape]:
        assert self.placing is not None
        if not self.together:
            for draw in self.draws:
                yield self.placing.place(sizes(self.splits, draw))[0].shape
            return
        for begin in range(0, len(self.draws), self.together):
            lengths = self.lengths()[begin : begin + self.together].reshape(-1)
            for _, placement in self.placing.batches(lengths):
                yield placement.shape


def all_steps(mix: Mix, each: int) -> dict[str, dict[str, Steps]]:
    """The steps by kind and side; a side is ours, or a padding of the library."""
    longest, by_length = PADDINGS
    dev = Steps(mix.inference(each, by_length=False), mix.dev)
    of_ours = Packed.into(EVAL_ROWS, mix.experiment.config.data.max_length)
    return {
        "training": {
            OURS: Steps(mix.draws, mix.splits, mix.packed().placing),
            longest: Steps(mix.draws, mix.splits),
            by_length: Steps(mix.length_grouped(), mix.splits),
        },
        "inference": {
            OURS: dataclasses.replace(dev, placing=of_ours, together=each),
            longest: dev,
            by_length: Steps(mix.inference(each, by_length=True), mix.dev),
        },
    }


class Result(NamedTuple):
    """The result for one kind of steps.

    Attributes:
        title: the method, kind and dtype.
        timing: the times of all sides, ours first.
        about: the other results.
    """

    title: str
    timing: Timing
    about: dict[str, Any]


class Comparison:
    """A library and ours on the same steps, with the same weights."""

    def __init__(self, library: Library, work: Path, glue: str, encoder: str) -> None:
        """Writes the work of both sides into the folder `work`."""
        self._library, self._work = library, work
        self._python = side_by_side.environment(library.name, library.requirements)
        self._each = STEPS[jax.default_backend()]
        self._ours: dict[str, Any] = {
            "glue": glue,
            "encoder": encoder,
            "method": library.method(huggingface.read_config(Path(encoder)).hidden_size),
            "trainable": TRAINED,
            "batch_size": BATCH_SIZE,
            "eval_batch_size": EVAL_ROWS,
            "optimizer": {"name": "adamw"},
        }
        mix = Mix(**self._ours)
        self._model, variables = mix.experiment.encoder(), mix.variables()
        self._tasks = {task.name: task.num_outputs for task in mix.experiment.tasks}
        heads: list[tables.Slot] = []
        for task, (name, outputs) in enumerate(self._tasks.items()):
            library.write(self._model, variables, task, work / name)
            heads += tables.head(name, task, outputs)
        tensor_files.write_tensors(work / "heads.safetensors", tables.write(variables, heads), {})
        self._steps = all_steps(mix, self._each["inference"])
        for kind in KINDS:
            for padding in PADDINGS:
                steps = self._steps[kind][padding].first(ROUNDS * self._each[kind])
                mix.save_padded(work / f"{kind}, {padding}.npz", steps.draws, steps.splits)

    def run(self, kind: str, dtype: str) -> Result:
        """Times both sides after checking that their losses agree."""
        mix = self._ours | {"dtype": dtype}
        both = {"kind": kind, "check": CHECK}
        each = self._each[kind]
        tell = both | {"mix": mix, "each": each, "steps": ROUNDS * each}
        (self._work / "ours.json").write_text(json.dumps(tell))
        tell = both | {"encoder": mix["encoder"], "tasks": self._tasks, "dtype": dtype}
        (self._work / "theirs.json").write_text(json.dumps(tell))
        with (
            Worker(PEERS / "ours.py", self._work) as ours,
            Worker(PEERS / self._library.script, self._work, self._python) as theirs,
        ):
            if (theirs.ready["device"] == "cpu") != (jax.default_backend() == "cpu"):
                raise SystemExit("JAX and PyTorch must both see the GPU, or neither.")
            losses = ours.ready.pop("losses"), theirs.ready.pop("losses")
            np.testing.assert_allclose(*losses, rtol=TOLERANCES[dtype])
            ready = {"losses": losses} | ours.ready | theirs.ready
            return self._time(kind, dtype, ours, theirs, ready)

    def _time(
        self, kind: str, dtype: str, ours: Worker, theirs: Worker, ready: dict[str, Any]
    ) -> Result:
        # No bound in bfloat16: a CPU may lack instructions, and PyTorch then uses one slow thread.
        sides = (*PADDINGS, BOUND) if dtype == "float32" else PADDINGS
        asks = {OURS: ours.ask} | {side: partial(theirs.ask, padding=side) for side in sides}
        each = self._each[kind]
        timing = side_by_side.run(asks, ROUNDS, each, BATCH_SIZE)
        of_mix = self._steps[kind]
        timed = {side: steps.first(ROUNDS * each) for side, steps in of_mix.items()}
        count = self._flops(kind)
        about = ready | {
            "positions_per_example": {side: steps.positions() for side, steps in timed.items()},
            "of_the_mix": {side: steps.positions() for side, steps in of_mix.items()},
            "model_tflops": {
                side: count(steps.lengths()) / sum(timing.seconds[side]) / 1e12
                for side, steps in timed.items()
            },
        }
        return Result(f"{self._library.title}, {kind}, {dtype}", timing, about)

    def _flops(self, kind: str) -> Callable[[np.ndarray], float]:
        """A function from the lengths of texts to the model's FLOPs, without padding."""
        at = (32, 64, 128)  # three points determine the parabola
        if kind == "training":
            known = [flops.training(self._model, TRAINED, length) for length in at]
        else:
            known = [flops.forward(self._model, length) for length in at]
        parabola = np.polyfit(at, known, 2)
        return lambda lengths: float(np.polyval(parabola, lengths).sum())


def main() -> None:
    """Compares with each library, in each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", required=True, help="the official GLUE files")
    parser.add_argument("--encoder", required=True, help="a BERT in Hugging Face's format")
    parser.add_argument("--out", required=True, type=Path, help="where to write the results")
    parser.add_argument(
        "--dimensions", choices=("base", "large"), help="use random weights of this size"
    )
    parser.add_argument("--peak", type=float, help="the GPU's peak, TFLOP/s in bfloat16")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU's memory
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        encoder = Path(folder) / "encoder"
        write_encoder(encoder, Path(args.encoder), args.dimensions)
        comparisons = []
        for library in LIBRARIES:
            work = Path(folder) / library.name
            work.mkdir()
            comparisons.append(Comparison(library, work, args.glue, str(encoder)))
        dtypes = DTYPES[jax.default_backend()]
        for dtype, comparison, kind in itertools.product(dtypes, comparisons, KINDS):
            results.append(comparison.run(kind, dtype))
            report(results, args.out, args.peak)


def report(results: Sequence[Result], out: Path, peak: float | None) -> None:
    """Writes and prints the results so far."""
    summaries = {r.title: r.timing.summary() | r.about for r in results}
    (out / "adapter_libraries.json").write_text(json.dumps(summaries, indent=1))
    timings = {result.title: result.timing for result in results}
    side_by_side.plot(out / "adapter_libraries.png", timings, columns=2)
    print("\n\n".join(markdown(summaries, peak)), flush=True)


def write_encoder(directory: Path, source: Path, dimensions: str | None) -> None:
    """Writes an encoder with all its weights, random if missing, such as a pooler's."""
    known = huggingface.KNOWN[f"bert-{dimensions}-uncased"] if dimensions else None
    config = known if isinstance(known, BertConfig) else huggingface.read_config(source)
    model = MultiTaskModel(config, num_outputs=(2,))
    if dimensions:
        variables = init_variables(model, jax.random.key(0))
    else:
        variables = huggingface.load_variables(model, source, seed=0)
    load_tokenizer(source).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    tensors = tables.write(variables, tables.bert(model.config))
    tensor_files.write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})


def markdown(summaries: Mapping[str, dict[str, Any]], peak: float | None) -> Iterator[str]:
    """The tables of docs/results.md: speed, memory, and utilisation of the device's peak."""
    sides, over = (OURS, *PADDINGS, BOUND), [f"ours over {padding}" for padding in PADDINGS]
    yield _table(
        ["examples per second", *sides, *over],
        {
            title: [_rate(found["examples_per_second"].get(side)) for side in sides]
            + [
                "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**ratio)
                for ratio in map(found["times_as_fast"].get, PADDINGS)
            ]
            for title, found in summaries.items()
        },
    )
    yield _table(
        ["peak memory, MiB", OURS, *PADDINGS],
        {
            title: [f"{found['peak_bytes'][side] / 2**20:.0f}" for side in (OURS, *PADDINGS)]
            for title, found in summaries.items()
        },
    )
    used = {
        title: [f"{tflops / peaks:.1%}" for tflops in found["model_tflops"].values()]
        for title, found in summaries.items()
        if (peaks := peak or PEAKS.get(found["device"]))
    }
    if used:
        yield _table(["model-FLOPs utilisation", OURS, *PADDINGS], used)


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}"


def _table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[title, *cells] for title, cells in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
