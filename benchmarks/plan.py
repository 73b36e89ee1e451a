"""Every configuration on every kind of TPU that has four chips, planned.

    python benchmarks/plan.py --tasks=DIR --glue=DIR

Prints the two Markdown tables of docs/plan.md; each row takes about a minute. --tasks holds the
tasks of `houlsby_extra`, --glue the official files of GLUE, with which configurations of BERT are
planned packed: BERT's vocabulary is that of all-MiniLM-L6-v2, whose package this needs beside
libtpu.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from pals_jax.convert.huggingface import architecture, resolve
from pals_jax.experiment.config import load
from pals_jax.experiment.experiment import Experiment
from pals_jax.models.bert import BertConfig
from pals_jax.training.plan.breakdown import PARTS
from pals_jax.training.plan.plan import Plan, plan
from pals_jax.training.plan.shown import duration

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
TOPOLOGIES = ("v2-8", "v3-8", "v4-8", "v5litepod-4", "v6e-4")
# Padded, 112 pairs have as many tokens as the 320 of a batch when they are packed.
OVERRIDES = {"unified_enro": ("--config.batch_size=112",)}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
COLUMNS = {
    "rows x positions": lambda p: f"{p.train.shape.rows} x {_positions(p)}",
    "memory per chip": lambda p: f"{p.memory / 2**30:.2f} of {p.kind.chip.hbm / 2**30:.0f} GiB",
    "TFLOP": lambda p: f"{p.train.flops / 1e12:.3f}",
    "the model's": lambda p: f"{p.train.model_share:.1%}",
    "host transfers": lambda p: str(p.train.program.host_transfers),
    "roofline": lambda p: f"{p.train.roofline * 1e3:.1f} ms",
    "step": lambda p: f"{p.train.seconds * 1e3:.1f} ms",
    "utilisation": lambda p: f"{p.train.utilisation:.0%}",
    "examples per second": lambda p: f"{p.train.examples / p.train.seconds:,.0f}",
    "run": lambda p: duration(p.hours),
}


def _positions(planned: Plan) -> str:
    """Of a row, or of a row of sources and one of targets."""
    return "+".join(map(str, planned.train.shape.room))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="a directory with a folder for each task")
    parser.add_argument("--glue", type=Path, required=True, help="GLUE's official files")
    args = parser.parse_args()

    _print_row("configuration", "TPU", *COLUMNS)
    _print_row("---", "---", *("---:" for _ in COLUMNS))
    shown = {}
    with tempfile.TemporaryDirectory() as scratch:
        for file in CONFIGS:
            argument = f":{args.tasks}" if file.stem == "houlsby_extra" else ""
            config = load([f"--config={file}{argument}", *OVERRIDES.get(file.stem, ())])
            _give_data(config, args.glue, Path(scratch))
            experiment = Experiment.from_config(config)
            for topology in TOPOLOGIES:
                planned = plan(experiment, topology)
                _print_row(file.stem, topology, *(cell(planned) for cell in COLUMNS.values()))
                shown[file.stem, topology] = planned.train.seconds_by_part
    print()
    _print_row("milliseconds", *PARTS, "exchanges")
    _print_row("---", *("---:" for _ in (*PARTS, "exchanges")))
    for (name, topology), seconds in shown.items():
        if seconds:
            _print_row(f"{name} on {topology}", *(f"{1e3 * each:.2f}" for each in seconds.values()))


def _give_data(config: ConfigDict, glue: Path, scratch: Path) -> None:
    """GLUE's files, and a BERT of the same sizes with its tokenizer but without weights."""
    sizes = architecture(config.encoder)
    if not isinstance(sizes, BertConfig) or sizes.model_type != "bert":
        return
    directory = scratch / config.encoder
    directory.mkdir(exist_ok=True)
    tokenizer = resolve("all-MiniLM-L6-v2")
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, directory)
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(sizes)))
    config.encoder = str(directory)
    if not config.data.own:
        config.data.source, config.data.dir = "glue_dir", str(glue)


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
