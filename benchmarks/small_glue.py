"""PALs against a shared encoder with nothing but heads, on four complete GLUE tasks.

    python benchmarks/small_glue.py --glue=DIR --out=DIR

Trains every method with every seed (same data order and steps for the same seed), and prints the
rows of the table in docs/results.md, but for its last column. Finished runs are only evaluated;
interrupted ones are resumed.
"""

import argparse
from pathlib import Path

import numpy as np

from pals_jax.experiment.config import load
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.evaluator import Results
from pals_jax.models import counts
from pals_jax.training.train import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "small_glue.py"
METHODS = ("shared", "pals(size=102)")
SEEDS = (0, 1)


def main() -> None:
    """Trains, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", required=True, help="a directory with the official GLUE files")
    parser.add_argument("--out", required=True, type=Path, help="where to write each run's workdir")
    args = parser.parse_args()

    rows: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    multiples = {}
    for seed in SEEDS:
        for method in METHODS:
            config = load(
                [
                    f"--config={CONFIG}:{method}",
                    f"--config.seed={seed}",
                    f"--config.data.dir={args.glue}",
                ]
            )
            multiples[method] = counts.count(Experiment.from_config(config).model()).multiple
            results = train(config, args.out / f"{method}-{seed}")
            for key, value in _scores(results):
                rows.setdefault(key, {}).setdefault(method, []).append(100 * value)
    print(_table(rows, multiples))


def _scores(results: Results) -> list[tuple[tuple[str, str, str], float]]:
    return [
        ((task, split, metric), value)
        for task, splits in results.items()
        for split, metrics in splits.items()
        for metric, value in metrics.items()
    ]


def _table(
    rows: dict[tuple[str, str, str], dict[str, list[float]]], multiples: dict[str, float]
) -> str:
    """One row for each metric: the mean over seeds, then each seed's value."""
    lines = [
        "| task | metric | " + " | ".join(METHODS) + " |",
        "| --- | --- |" + " --- |" * len(METHODS),
    ]
    for (task, _, metric), by_method in rows.items():
        cells = [_cell(by_method[method]) for method in METHODS]
        lines.append(f"| {task} | {metric} | " + " | ".join(cells) + " |")
    counts = [f"{multiples[method]:.3f}x" for method in METHODS]
    lines.append("| parameters | multiple of the encoder | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    seeds = ", ".join(f"{value:.1f}" for value in values)
    return f"{np.mean(values):.1f} ({seeds})"


if __name__ == "__main__":
    main()
