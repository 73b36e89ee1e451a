"""The command line: parses and dispatches, nothing else."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pals_jax import __version__
from pals_jax.errors import UserError

if TYPE_CHECKING:
    from pals_jax.run import Run

_CONFIG_HELP = "a file of configs/, with its argument; override any key with --config.KEY=VALUE"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for a wrong input."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if overrides and not hasattr(args, "config"):
        parser.error(f"{args.command} takes no configuration: {' '.join(overrides)}")
    args.overrides = overrides
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        args.run(args)
    except UserError as error:
        print(f"pals-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = None
    except OSError as error:  # a full disk, a directory that may not be written
        place = error.filename or "a file"
        print(f"pals-jax: cannot read or write {place}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


def _path(text: str) -> Path:
    return Path(text).expanduser()  # no shell does it behind "--workdir="


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pals-jax", description="One encoder, many tasks.")
    parser.add_argument("--version", action="version", version=f"pals-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or go on training, an experiment")
    train.set_defaults(run=_train)
    how = train.add_mutually_exclusive_group()
    how.add_argument(
        "--base",
        type=_path,
        metavar="DIR",
        help="add the tasks to those of this run, whose encoder and tasks stay as they are",
    )
    how.add_argument(
        "--separate",
        action="store_true",
        help="train one model for each task alone, in DIR/TASK: the rival of sharing",
    )
    params = commands.add_parser("params", help="count the parameters of an experiment")
    params.set_defaults(run=_params)
    methods = commands.add_parser("methods", help="list the methods and their design space")
    methods.set_defaults(run=_methods)
    methods.add_argument("--markdown", action="store_true", help="as Markdown, to stdout")
    evaluate = commands.add_parser("evaluate", help="score the best checkpoint on the dev sets")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument(
        "--ablate",
        action="store_true",
        help="what is lost without the adapters of each span of layers; draws DIR/ablation.png",
    )
    predict = commands.add_parser("predict", help="predict with the best checkpoint")
    predict.set_defaults(run=_predict)

    convert = commands.add_parser(
        "convert",
        help="write a task of a run for another code or as one file, or make a run of such files",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("--task", metavar="NAME", help="the task to write")
    convert.add_argument(
        "--to",
        metavar="FORMAT",
        help="task (the default), huggingface (merged), adapterhub or peft",
    )
    convert.add_argument("--out", type=_path, metavar="PATH", help="where to write the task")
    convert.add_argument(
        "--files", type=_path, nargs="+", metavar="FILE", help="task files to make a run of"
    )
    convert.add_argument(
        "--base", metavar="BASE", help="with --files: the run or the encoder they were trained on"
    )

    for command in (train, params):
        command.add_argument("--config", required=True, metavar="FILE[:ARG]", help=_CONFIG_HELP)
    for command in (train, evaluate, predict, convert):
        command.add_argument(
            "--workdir", required=True, type=_path, metavar="DIR", help="the directory of the run"
        )
    for command in (params, methods, evaluate, predict):
        command.add_argument("--json", action="store_true", help="machine-readable, to stdout")

    what = predict.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="NAME", help="the task to answer")
    what.add_argument(
        "--submission", type=_path, metavar="DIR", help="write the files for GLUE's server there"
    )
    predict.add_argument(
        "--input",
        type=_path,
        metavar="FILE",
        help="a TSV, CSV or JSONL file with the task's text columns; by default stdin, one example"
        " a line: its texts separated by a tab, or a JSON object",
    )
    predict.add_argument(
        "--fill-missing",
        action="store_true",
        help="with --submission: answer tasks that were not trained with their first label",
    )
    return parser


def _train(args: argparse.Namespace) -> None:
    from pals_jax import config, train

    configuration = config.load([f"--config={args.config}", *args.overrides])
    if args.separate:
        train.train_separately(configuration, args.workdir)
    else:
        train.train(configuration, args.workdir, args.base)


def _params(args: argparse.Namespace) -> None:
    from pals_jax import config, params
    from pals_jax.experiment import Experiment

    experiment = Experiment.from_config(config.load([f"--config={args.config}", *args.overrides]))
    counts = params.count(experiment.model())
    names = tuple(task.name for task in experiment.tasks)
    if args.json:
        print(json.dumps(counts.to_json()))
    else:
        _print(params.table(counts, experiment.config.method, names))


def _methods(args: argparse.Namespace) -> None:
    from pals_jax import catalogue

    if args.json:
        print(json.dumps(catalogue.rows()))
    elif args.markdown:
        print(catalogue.markdown())
    else:
        _print(catalogue.table(), width=200)


def _evaluate(args: argparse.Namespace) -> None:
    from pals_jax import evaluate
    from pals_jax.run import Run

    run = Run.load(args.workdir)
    if args.ablate:
        _ablate(run, args)
        return
    results = run.evaluate()
    if args.json:
        print(json.dumps({"step": run.step, "results": results}))
    else:
        _print(evaluate.table(run.experiment.tasks, results))


def _ablate(run: "Run", args: argparse.Namespace) -> None:
    from pals_jax import ablation

    changes = ablation.ablate(run)
    path = args.workdir / "ablation.png"
    ablation.plot(changes, path)
    if args.json:
        print(json.dumps(ablation.to_json(changes)))
    else:
        print(f"drew {path}", file=sys.stderr)


def _predict(args: argparse.Namespace) -> None:
    from pals_jax import predict
    from pals_jax.run import Run

    run = Run.load(args.workdir)
    if args.submission:
        path = predict.write_submission(run, args.submission, args.fill_missing)
        print(json.dumps({"submission": str(path)}) if args.json else path)
        return
    task = run.task(args.task)
    texts = predict.read_texts(task, args.input)
    predict.write_records(predict.predict(run, task, texts), args.json, sys.stdout)


def _convert(args: argparse.Namespace) -> None:
    from pals_jax import exchange
    from pals_jax.run import Run

    one, many = (args.task, args.out), (args.files, args.base)
    if all(many) and not any((*one, args.to)):
        exchange.assemble(str(_path(args.base)), args.files, args.workdir)
    elif all(one) and not any(many):
        exchange.export(Run.load(args.workdir), args.task, args.to or "task", args.out)
    else:
        raise UserError("convert takes --task and --out to write a task, or --files and --base.")


def _print(table: object, width: int | None = None) -> None:
    """For a person, on stderr: stdout is for machines."""
    from rich.console import Console

    Console(stderr=True, width=width).print(table)
