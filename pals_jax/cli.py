"""The command line: parses and dispatches, nothing else."""

import argparse
import atexit
import contextlib
import gc
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pals_jax import __version__
from pals_jax.runtime.accelerators import skip_absent_tpu
from pals_jax.runtime.errors import Preempted, UserError

if TYPE_CHECKING:
    from etils import epath

    from pals_jax.inference.run import Run

# Before it ends, Python would go through millions of objects to free them: 0.7 s of every command.
atexit.register(gc.freeze)

_CONFIG_HELP = "a file of configs/, with its argument; override any key with --config.KEY=VALUE"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0: success; 2: invalid input; 75: a bucket, hub or other host did not respond; 143: the run was
    told to stop.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if overrides and not hasattr(args, "config"):
        parser.error(f"{args.command} takes no configuration: {' '.join(overrides)}")
    args.overrides = overrides
    skip_absent_tpu()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Orbax logs tracebacks of errors that it also raises and that we report.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return status_of(lambda: args.run(args))


def status_of(run: Callable[[], None]) -> int:
    """Runs something and returns its exit status, as in `main`; an error is one line on stderr."""
    try:
        run()
    except UserError as error:
        print(f"pals-jax: {error}", file=sys.stderr)
        return error.status
    except Preempted as stop:
        print(f"pals-jax: {stop}", file=sys.stderr)
        return 143  # the status that shells report for a program ended by SIGTERM
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        sys.stdout = None
    except OSError as error:  # for example a full disk, or a read-only directory
        place, reason = error.filename or "a file", error.strerror or error
        print(f"pals-jax: cannot read or write {place}: {reason}.", file=sys.stderr)
        return 2
    return 0


def _path(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a path on this machine")
    return Path(text).expanduser()  # shells do not expand ~ after "--input="


def _workdir(text: str) -> "epath.Path":
    from pals_jax.runtime import storage

    try:
        return storage.workdir(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a price")
    return price


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pals-jax", description="One encoder, many tasks.")
    parser.add_argument("--version", action="version", version=f"pals-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an experiment, or resume its training")
    train.set_defaults(run=_train)
    how = train.add_mutually_exclusive_group()
    how.add_argument(
        "--base",
        type=_workdir,
        metavar="DIR",
        help="add the tasks to this run's tasks; its encoder and tasks stay unchanged",
    )
    how.add_argument(
        "--separate",
        action="store_true",
        help="train a separate model for each task, in DIR/TASK: the baseline without sharing",
    )
    how.add_argument(
        "--sweep",
        action="store_true",
        help="train each entry of the configuration's `sweep` in DIR/NAME; print one table of all",
    )
    counts = commands.add_parser("params", help="count the parameters of an experiment")
    counts.set_defaults(run=_params)
    plan = commands.add_parser(
        "plan", help="estimate memory, time and cost of an experiment on a TPU; needs no TPU"
    )
    plan.set_defaults(run=_plan)
    plan.add_argument(
        "--topology", required=True, metavar="KIND", help="v3-8 or another kind listed in launch/"
    )
    plan.add_argument(
        "--plot", type=_path, metavar="FILE", help="draw where the time of a step goes, as a PNG"
    )
    plan.add_argument("--price", type=_price, metavar="USD", help="price of the whole TPU per hour")
    methods = commands.add_parser("methods", help="list the methods and their design space")
    methods.set_defaults(run=_methods)
    listed = methods.add_mutually_exclusive_group()
    listed.add_argument("--markdown", action="store_true", help="print Markdown to stdout")
    evaluator = commands.add_parser("evaluate", help="score the best checkpoint on the dev sets")
    evaluator.set_defaults(run=_evaluate)
    evaluator.add_argument(
        "--ablate",
        action="store_true",
        help="score without the adapters of each span of layers; plots to DIR/ablation.png",
    )
    predict = commands.add_parser("predict", help="predict with the best checkpoint")
    predict.set_defaults(run=_predict)
    server = commands.add_parser("serve", help="answer over HTTP with the best checkpoint")
    server.set_defaults(run=_serve)
    server.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    server.add_argument("--port", type=int, default=8000, help="default: 8000")
    server.add_argument(
        "--max-tasks", type=int, metavar="N", help="default: the run's tasks and 16 more"
    )

    convert = commands.add_parser(
        "convert",
        help="export a task to another format or a task file, or make a run from task files",
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
        "--files", type=_path, nargs="+", metavar="FILE", help="task files to make a run from"
    )
    convert.add_argument(
        "--base", metavar="BASE", help="with --files: the run or the encoder they were trained on"
    )

    for command in (train, counts, plan):
        command.add_argument("--config", required=True, metavar="FILE[:ARG]", help=_CONFIG_HELP)
    for command in (train, evaluator, predict, server, convert):
        command.add_argument(
            "--workdir",
            required=True,
            type=_workdir,
            metavar="DIR",
            help="the run's directory, or gs://BUCKET/DIR",
        )
    for command in (train, evaluator):
        processes = command.add_argument_group(
            "several processes, where neither Cloud TPU nor SLURM describes them"
        )
        processes.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        processes.add_argument("--processes", type=int, metavar="N", help="number of processes")
        processes.add_argument(
            "--process", type=int, metavar="I", help="index of this process, from 0"
        )
    for machine_readable in (counts, plan, listed, evaluator, predict):
        machine_readable.add_argument("--json", action="store_true", help="print JSON to stdout")

    what = predict.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="NAME", help="the task to predict, or all")
    what.add_argument(
        "--submission", type=_path, metavar="DIR", help="write the files for GLUE's server to DIR"
    )
    predict.add_argument(
        "--input",
        type=_path,
        metavar="FILE",
        help="a TSV, CSV or JSONL file with the task's text columns; default: stdin with one"
        " example per line, either tab-separated texts or a JSON object",
    )
    predict.add_argument(
        "--fill-missing",
        action="store_true",
        help="with --submission: answer every untrained task with its first label",
    )
    return parser


def _train(args: argparse.Namespace) -> None:
    from pals_jax.experiment import config
    from pals_jax.runtime import distributed
    from pals_jax.training import sweep, train

    with distributed.ended_by_sigterm():
        distributed.connect(args.coordinator, args.processes, args.process)
        configuration = config.load([f"--config={args.config}", *args.overrides])
        if args.separate:
            train.train_separately(configuration, args.workdir)
        elif args.sweep:
            sweep.sweep(configuration, args.workdir)
        else:
            train.train(configuration, args.workdir, args.base)


def _params(args: argparse.Namespace) -> None:
    from pals_jax.experiment import config
    from pals_jax.experiment.experiment import Experiment
    from pals_jax.models import counts
    from pals_jax.runtime.console import print_table

    experiment = Experiment.from_config(config.load([f"--config={args.config}", *args.overrides]))
    counted = counts.count(experiment.model())
    names = tuple(task.name for task in experiment.tasks)
    if args.json:
        print(json.dumps(counted.to_json()))
    else:
        print_table(counts.counts_table(counted, experiment.config.method, names))


def _plan(args: argparse.Namespace) -> None:
    from pals_jax.experiment import config
    from pals_jax.experiment.experiment import Experiment
    from pals_jax.runtime.console import print_table
    from pals_jax.training.plan import plan, shown

    experiment = Experiment.from_config(config.load([f"--config={args.config}", *args.overrides]))
    planned = plan.plan(experiment, args.topology, args.price)
    if args.plot is not None:
        shown.plot(planned, args.plot)
    if args.json:
        print(json.dumps(planned.to_json()))
    else:
        print_table(shown.plan_table(planned))


def _methods(args: argparse.Namespace) -> None:
    from pals_jax.models import method_table
    from pals_jax.runtime.console import print_table

    if args.json:
        print(json.dumps(method_table.rows()))
    elif args.markdown:
        print(method_table.markdown())
    else:
        print_table(method_table.table(), width=200)


def _evaluate(args: argparse.Namespace) -> None:
    from pals_jax.data import text_metrics
    from pals_jax.inference.evaluator import results_table
    from pals_jax.inference.load import load
    from pals_jax.runtime import distributed
    from pals_jax.runtime.console import print_table

    distributed.connect(args.coordinator, args.processes, args.process)
    run = load(args.workdir, format="run")
    if args.ablate:
        _ablate(run, args)
        return
    results = run.evaluate()
    if not distributed.is_main():
        return
    if args.json:
        found: dict[str, object] = {"step": run.step, "results": results}
        if any(run.task(name).output == "text" for name in results):
            found["sacrebleu"] = text_metrics.bleu_signature()
        print(json.dumps(found))
    else:
        print_table(results_table([run.task(name) for name in results], results))


def _ablate(run: "Run", args: argparse.Namespace) -> None:
    from pals_jax.inference import ablation
    from pals_jax.runtime import distributed

    changes = ablation.ablate(run)
    if not distributed.is_main():
        return
    path = args.workdir / "ablation.png"
    ablation.plot(changes, path)
    if args.json:
        print(json.dumps(ablation.to_json(changes)))
    else:
        print(f"drew {path}", file=sys.stderr)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Spares going through the millions of objects that imports make and keep: 0.3 s of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _predict(args: argparse.Namespace) -> None:
    if args.input if args.submission else args.fill_missing:
        raise UserError("--input requires --task, and --fill-missing requires --submission.")
    with _without_collection():
        from pals_jax.inference import predict, texts
        from pals_jax.inference.load import load

        run = load(args.workdir, format="run")
    if args.submission:
        path = predict.write_submission(run, args.submission, args.fill_missing)
        print(json.dumps({"submission": str(path)}) if args.json else path)
        return
    tasks = run.chosen(args.task)
    fitted, rows = predict.stream(run, tasks, texts.from_file(args.input))
    predict.write(rows, len(fitted.tasks), args.json, sys.stdout)


def _serve(args: argparse.Namespace) -> None:
    try:
        from pals_jax.inference.server.command import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve needs {error.name}, which is not here: pip install 'pals_jax[serve]'."
        ) from error
    serve(args.workdir, args.host, args.port, args.max_tasks)


def _convert(args: argparse.Namespace) -> None:
    from pals_jax.inference.export import export
    from pals_jax.inference.load import from_task_files, load
    from pals_jax.runtime.console import say

    one, many = (args.task, args.out), (args.files, args.base)
    if all(many) and not any((*one, args.to)):
        run = from_task_files(args.files, args.base)
        run.save(args.workdir)
        say(f"wrote a run that predicts {', '.join(run.tasks)} to {args.workdir}")
    elif all(one) and not any(many):
        export(load(args.workdir, format="run"), args.task, args.to or "task", args.out)
    else:
        raise UserError("convert needs --task and --out to write a task, or --files and --base.")
