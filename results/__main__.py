"""The commands `run`, `bundle` and `report`."""

import argparse
import math
import os
import sys
from pathlib import Path

from pals_jax.cli import status_of
from results import claims


def main() -> int:
    """Runs one command and returns its exit status, as `pals_jax.cli.main` does."""
    parser = argparse.ArgumentParser(prog="python -m results", description="Claims, on data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run what is missing, the cheapest decision first")
    run.set_defaults(run=_run)
    run.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="see results/config.py and translation.py",
    )
    run.add_argument("--only", default="", metavar="H1,U1", help="these claims only")
    run.add_argument(
        "--hours",
        type=_positive,
        default=math.inf,
        metavar="H",
        help="stop after so long; it can go on",
    )
    run.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    run.add_argument(
        "--workdirs", type=Path, default=Path("runs/claims"), help="where unfinished runs live"
    )
    run.add_argument(
        "--plan",
        action="store_true",
        help="print what is missing, and how long it takes at this device's speed",
    )
    bundle = commands.add_parser("bundle", help="pack what a machine without a network needs")
    bundle.set_defaults(run=_bundle)
    bundle.add_argument("--data", type=Path, required=True, metavar="DIR")
    bundle.add_argument("--out", type=Path, required=True, metavar="DIR")
    bundle.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    bundle.add_argument("--part-mib", type=int, default=60, help="the largest part, in MiB")
    report = commands.add_parser("report", help="make docs/results from the records of the runs")
    report.set_defaults(run=_report)
    args = parser.parse_args()
    return status_of(lambda: args.run(args))


def _positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _run(args: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu" if args.device == "cpu" else "cuda"
    from pals_jax.runtime import distributed
    from results import costs, runs
    from results.jobs import Campaign, check_data

    listed = claims.read()
    chosen = listed.only(args.only)
    check_data(args.data)
    campaign = Campaign(listed, args.device, args.data)
    with distributed.ended_by_sigterm():
        if args.plan or args.device != "cpu":  # before hours of a device begin
            costs.plan(costs.Costs(campaign), chosen)
        if not args.plan:
            runs.run(runs.Runner(campaign, args.workdirs), chosen, args.hours)


def _bundle(args: argparse.Namespace) -> None:
    from results.bundle import make

    make(args.data, args.out, args.device, args.part_mib * 2**20)


def _report(args: argparse.Namespace) -> None:
    from results.report import write

    del args
    write(claims.read())


if __name__ == "__main__":
    sys.exit(main())
