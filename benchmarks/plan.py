"""Every configuration on every kind of TPU that has four chips, planned.

    python benchmarks/plan.py --tasks=DIR

Prints the Markdown table of docs/plan.md; each row takes about a minute. DIR holds the tasks of
`houlsby_extra`. Needs libtpu and the package of the encoder all-MiniLM-L6-v2.
"""

import argparse
from pathlib import Path

from pals_jax.experiment.config import load
from pals_jax.experiment.experiment import Experiment
from pals_jax.training.plan.plan import Plan, plan
from pals_jax.training.plan.shown import duration

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
TOPOLOGIES = ("v2-8", "v3-8", "v4-8", "v5litepod-4", "v6e-4")
# Padded, 112 pairs have as many tokens as the 320 of a batch when they are packed.
OVERRIDES = {"unified_enro": ("--config.batch_size=112",)}
COLUMNS = {
    "memory per chip": lambda p: f"{p.memory / 2**30:.2f} of {p.kind.chip.hbm / 2**30:.0f} GiB",
    "TFLOP per step": lambda p: f"{p.train.flops / 1e12:.3f}",
    "the model's": lambda p: f"{p.train.model_share:.1%}",
    "all-reduces": lambda p: "{} of {:.0f} MiB".format(*_all_reduces(p)),
    "host transfers": lambda p: str(p.train.program.host_transfers),
    "roofline": lambda p: f"{p.train.roofline * 1e3:.1f} ms",
    "step": lambda p: f"{p.train.seconds * 1e3:.1f} ms",
    "examples per second": lambda p: f"{p.train.examples / p.train.seconds:,.0f}",
    "run": lambda p: duration(p.hours),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="a directory with a folder for each task")
    args = parser.parse_args()

    print(f"| configuration | TPU | {' | '.join(COLUMNS)} |")
    print("| --- | --- |" + " ---: |" * len(COLUMNS))
    for config in CONFIGS:
        argument = f":{args.tasks}" if config.stem == "houlsby_extra" else ""
        overrides = OVERRIDES.get(config.stem, ())
        experiment = Experiment.from_config(load([f"--config={config}{argument}", *overrides]))
        for topology in TOPOLOGIES:
            planned = plan(experiment, topology)
            cells = (cell(planned) for cell in COLUMNS.values())
            print(f"| {config.stem} | {topology} | {' | '.join(cells)} |", flush=True)


def _all_reduces(planned: Plan) -> tuple[int, float]:
    number, size = planned.train.program.exchanges["all-reduce"]
    return number, size / 2**20


if __name__ == "__main__":
    main()
