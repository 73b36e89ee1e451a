"""`pals-jax serve` against the same HTTP server around `adapters`: many tasks, many clients.

    python benchmarks/serving.py --glue=DIR --encoder=DIR --out=DIR

64 tasks: eight of each GLUE task, each with Houlsby adapters and a head of its own. 64 clients ask
one text or pair of a random task, again as soon as they are answered. Every answer, of every
server, must equal that of `Run.predict` to 1e-5. `adapters` answers each request with a pass of its
own, or the requests that wait for one task together. The sides take turns; the others are idle
meanwhile. Then ours at half its rate, and while 20 tasks are added and removed. Writes serving.json
and a plot, and prints the table of docs/serving.md.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import side_by_side
from adapter_libraries import LIBRARIES, write_encoder
from side_by_side import PEERS

from pals_jax import Run, Task
from pals_jax.convert import huggingface, tables, tensor_files, to_adapterhub
from pals_jax.data.glue_dir import GlueDir
from pals_jax.data.tasks import GLUE
from pals_jax.data.tokenize import load_tokenizer
from pals_jax.experiment import config as config_lib
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.export import export
from pals_jax.inference.server.command import TOKEN

HOULSBY = LIBRARIES[0]
LOCUST = ["locust>=2.40,<3"]
NAMES = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
COPIES = 8  # tasks of each of these
MORE = 20  # tasks that come and go
QUESTIONS = 16  # of each task
CLIENTS, SECONDS, ROUNDS = 64, 10, 5
OURS, EACH, GROUPED = "pals_jax", "per request", "grouped"
ADMINISTRATOR = "the token of the benchmark"
# Runs a module of another environment, which finds our packages behind its own: it has a
# transformers of another version.
BEHIND = """
import os, runpy, sys
sys.path += sys.argv.pop(1).split(os.pathsep)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=False)
"""


class Asked(NamedTuple):
    """What came of a load.

    Attributes:
        per_second: the answers per second.
        seconds: of each request.
    """

    per_second: float
    seconds: list[float]

    def percentile(self, percent: float) -> float:
        """Of the seconds of the requests."""
        return float(np.percentile(self.seconds, percent))


def main() -> None:
    """Compares the servers, then looks at ours alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", required=True, help="the official GLUE files")
    parser.add_argument("--encoder", required=True, help="a BERT in Hugging Face's format")
    parser.add_argument("--out", required=True, type=Path, help="where to write the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        work = Work(Path(folder), args.glue, args.encoder)
        ports = {OURS: servers.enter_context(ours(work))}
        for side in (EACH, GROUPED):
            ports[side] = servers.enter_context(theirs(work, side))
        found: dict[str, list[Asked]] = {side: [] for side in ports}
        for number in range(ROUNDS):
            for side, port in ports.items():
                found[side].append(load(work, port))
                print(number + 1, side, f"{found[side][-1].per_second:.1f}", file=sys.stderr)
        most = max(asked.per_second for asked in found[OURS])
        half = load(work, ports[OURS], rate=most / 2)
        changing = load_while_tasks_change(work, ports[OURS])
    results = summary(found, half, changing)
    (args.out / "serving.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(args.out / "serving.png", results)
    print("\n\n".join(markdown(results)))


# ------------------------------------------------ what is served, and what is asked


class Work:
    """What the servers serve and what they are asked, as files in a folder."""

    def __init__(self, folder: Path, glue: str, encoder: str) -> None:
        """Makes the tasks, and asks the model offline."""
        self.folder, self.workdir = folder, folder / "run"
        self.questions, self.of_files = folder / "questions.jsonl", folder / "of_files.jsonl"
        self._base = folder / "encoder"
        self._base.mkdir()
        write_encoder(self._base, huggingface.resolve(encoder), None)
        tasks = [
            dataclasses.replace(GLUE[name], name=f"{name}_{copy}")
            for copy, name in itertools.product(range(COPIES), NAMES)
        ]
        run = self._run(tasks, seed=0)
        run.save(self.workdir)
        self._write_theirs(run)
        self._ask(run, glue, self.questions)
        more = [dataclasses.replace(task, name=f"new_{task.name}") for task in tasks[:MORE]]
        run = self._run(more, seed=1)
        self.files = {task.name: folder / f"{task.name}.task" for task in more}
        for name, file in self.files.items():
            export(run, name, "task", file)
        self._ask(run, glue, self.of_files)

    def _run(self, tasks: Sequence[Task], seed: int) -> Run:
        """A run of these tasks, whose parameters are random and not the identity."""
        base = self._base
        architecture = huggingface.architecture(str(base))
        config = config_lib.default()
        config.encoder, config.method = (
            str(base),
            HOULSBY.method(architecture.stacks["encoder"].hidden_size),
        )
        config.tasks = tuple(task.name for task in tasks)
        experiment = Experiment(config, tuple(tasks), architecture)
        variables = huggingface.load_variables(experiment.model(), base, seed)
        rng = np.random.default_rng(seed)
        adapters = jax.tree.map(
            lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), variables["adapters"]
        )
        return Run.of(experiment, load_tokenizer(base), {**variables, "adapters": adapters})

    def _ask(self, run: Run, glue: str, out: Path) -> None:
        """Writes questions with the answers of the model offline."""
        source, rng = GlueDir(Path(glue)), np.random.default_rng(1)
        with out.open("w") as file:
            for task in run.experiment.tasks:
                of_glue = GLUE[task.name.removeprefix("new_").split("_")[0]]
                texts = source.read(of_glue, of_glue.eval_splits[0]).texts
                some = [texts[i] for i in rng.choice(len(texts), QUESTIONS, replace=False)]
                given: list[Any] = [x if len(x) == 2 else x[0] for x in some]
                for text, row in zip(given, run.predict(given, task=task.name), strict=True):
                    answer = {k: getattr(row, k) for k in ("task", "probabilities", "value")}
                    question = {"text": text, "task": task.name}
                    print(json.dumps({"question": question, "answer": answer}), file=file)

    def _write_theirs(self, run: Run) -> None:
        """Writes the same adapters and heads for the library."""
        model, heads = run.experiment.encoder(), list[tables.Slot]()
        variables = jax.device_get(run.variables)
        for i, task in enumerate(run.experiment.tasks):
            to_adapterhub(model, variables, i, self.folder / task.name)
            heads += tables.head(task.name, i, task.num_outputs)
        tensors = tables.write(variables, heads)
        tensor_files.write_tensors(self.folder / "heads.safetensors", tensors, {})
        given = {
            "encoder": str(self._base),
            "tokenizer": str(self.workdir / "tokenizer"),
            "max_length": run.experiment.config.data.max_length,
            "tasks": {name: task.num_outputs for name, task in run.tasks.items()},
            "as_json": [dataclasses.asdict(task) for task in run.experiment.tasks],
        }
        (self.folder / "theirs.json").write_text(json.dumps(given))


# ------------------------------------------------ servers


def ours(work: Work) -> contextlib.AbstractContextManager[int]:
    """`pals-jax serve`; gives its port."""
    command = [sys.executable, "-m", "pals_jax", "serve", f"--workdir={work.workdir}", "--port=0"]
    room = COPIES * len(NAMES) + MORE
    return server([*command, f"--max-tasks={room}"], work.folder / "ours.log")


def theirs(work: Work, side: str) -> contextlib.AbstractContextManager[int]:
    """The server around the library; gives its port."""
    python = side_by_side.environment(HOULSBY.name, HOULSBY.requirements)
    # The checkout itself too: an editable installation is not on sys.path.
    path = os.pathsep.join([str(PEERS), str(PEERS.parents[1]), *sys.path])
    command = [str(python), "-P", "-c", BEHIND, path, "adapters_server", str(work.folder), side]
    return server(command, work.folder / f"{side}.log")


@contextlib.contextmanager
def server(command: list[str], log: Path) -> Iterator[int]:
    """A server as a process, when it is ready; it is ended afterwards."""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stderr=errors, env=os.environ | {TOKEN: ADMINISTRATOR}
        ) as process,
    ):
        try:
            while True:
                time.sleep(0.2)
                if process.poll() is not None:
                    raise SystemExit(f"{command} has ended: {log.read_text()[-2000:]}")
                ports = [x for x in log.read_text().splitlines() if '"port": ' in x]
                if ports and is_ready(port := json.loads(ports[0])["port"]):
                    break
            yield port
        finally:
            process.terminate()


def is_ready(port: int) -> bool:
    """Whether a server has compiled everything."""
    try:
        return ask(port, "GET", "/readyz") is not None
    except urllib.error.HTTPError:
        return False


def ask(port: int, method: str, path: str, body: bytes | None = None) -> bytes:
    """The body of a response; an error status raises."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, method=method)
    request.add_header("Authorization", f"Bearer {ADMINISTRATOR}")
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


# ------------------------------------------------ loads


def load(work: Work, port: int, rate: float | None = None, seconds: float = SECONDS) -> Asked:
    """The answers of all clients, each of which has been compared."""
    return finished(start_load(work, port, rate, seconds))


def start_load(work: Work, port: int, rate: float | None, seconds: float) -> subprocess.Popen[str]:
    """Starts the load tool."""
    python = side_by_side.environment("locust", LOCUST)
    command = [str(python), str(PEERS / "load.py"), str(port), str(work.questions)]
    command += [str(CLIENTS), str(seconds)]
    command += [] if rate is None else [str(rate)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> Asked:
    """Waits for the load tool; a failed or wrong answer ends the benchmark."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the load tool has ended with {process.returncode}")
    found = json.loads(out.splitlines()[-1])
    if found["failed"]:
        raise SystemExit(f"{found['failed']} wrong answers, such as {found['failures']}")
    return Asked(found["per_second"], found["seconds"])


def load_while_tasks_change(work: Work, port: int) -> Asked:
    """A full load, while all tasks of the files are added, asked, and removed, four at a time."""
    process = start_load(work, port, None, 4 * SECONDS)
    asked: dict[str, list[Any]] = {name: [] for name in work.files}
    for line in work.of_files.read_text().splitlines():
        known = json.loads(line)
        asked[known["question"]["task"]].append(known)

    def come_and_go(name: str) -> None:
        ask(port, "POST", "/v1/tasks", work.files[name].read_bytes())
        for known in asked[name][:2]:
            question = json.dumps(known["question"]).encode()
            answer = json.loads(ask(port, "POST", "/v1/predict", question))["answers"][0][0]
            for one, other in zip(values(answer), values(known["answer"]), strict=True):
                assert abs(one - other) <= 1e-5, (answer, known)
        ask(port, "DELETE", f"/v1/tasks/{name}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come_and_go, work.files))
    if process.poll() is not None:
        raise SystemExit("the load has ended before all tasks had come and gone; make it longer")
    return finished(process)


def values(answer: dict[str, Any]) -> list[float]:
    """The numbers of an answer."""
    return [
        *answer["probabilities"].values(),
        *([] if answer["value"] is None else [answer["value"]]),
    ]


# ------------------------------------------------ results


def ratios(found: dict[str, list[Asked]], side: str) -> list[float]:
    """In each round, our rate over that of a side."""
    pairs = zip(found[OURS], found[side], strict=True)
    return [mine.per_second / other.per_second for mine, other in pairs]


def summary(found: dict[str, list[Asked]], half: Asked, changing: Asked) -> dict[str, Any]:
    """All results but the single times."""

    def one(asked: Asked) -> dict[str, float]:
        percentiles = {f"p{p}_seconds": asked.percentile(p) for p in (50, 90, 99)}
        return {"per_second": asked.per_second, "requests": len(asked.seconds), **percentiles}

    return {
        "clients": CLIENTS,
        "tasks": COPIES * len(NAMES),
        "rounds": {side: [one(asked) for asked in rounds] for side, rounds in found.items()},
        "ours_over": {side: ratios(found, side) for side in (EACH, GROUPED)},
        "half": one(half),
        "while_tasks_change": one(changing),
    }


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The table and the sentences of docs/serving.md; ratios depend less on the machine."""
    lines = [
        "| server | pals_jax answers, times as many requests | median wait | 99% wait at most |"
    ]
    lines += ["| --- | ---: | ---: | ---: |"]
    for side in results["rounds"]:
        over = results["ours_over"].get(side)
        rate = f"{statistics.median(over):.2f} ({min(over):.2f} to {max(over):.2f})" if over else ""
        median, most = waits(results, side)
        lines.append(f"| {side} | {rate} | {median:.1f} | {most:.1f} |")
    yield "\n".join(lines)
    for title, key in (
        ("half the highest rate", "half"),
        ("while tasks change", "while_tasks_change"),
    ):
        last = results[key]["p99_seconds"] / results[key]["p50_seconds"]
        yield f"{title}: {results[key]['requests']} requests, p99 {last:.1f} times the median"


def waits(results: dict[str, Any], side: str) -> tuple[float, float]:
    """A server's median and 99% wait, medians of its rounds, as multiples of our median wait."""

    def median(side: str, key: str) -> float:
        return statistics.median(one[key] for one in results["rounds"][side])

    ours = median(OURS, "p50_seconds")
    return median(side, "p50_seconds") / ours, median(side, "p99_seconds") / ours


def plot(path: Path, results: dict[str, Any]) -> None:
    """Draws rates and waits of all servers, as multiples of ours."""
    figure, (rates, times) = plt.subplots(1, 2, figsize=(10, 2.4), sharey=True)
    for place, side in enumerate(results["rounds"]):
        color = "C7" if place else "C0"
        each = [1 / ratio for ratio in results["ours_over"].get(side, [1])]
        rates.barh(place, statistics.median(each), color=color)
        rates.plot(each, [place] * len(each), "k.", markersize=3)
        median, most = waits(results, side)
        times.plot([median, most], [place] * 2, color=color, linewidth=3)
        times.plot([median], [place], "o", color=color)
    rates.set_yticks(range(3), [OURS, *(f"adapters, {side}" for side in (EACH, GROUPED))])
    rates.invert_yaxis()
    rates.set_xlabel("requests answered per second, relative to pals_jax")
    times.set_xlabel("median to 99% wait, relative to pals_jax's median")
    times.set_xlim(left=0)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", dpi=120)


if __name__ == "__main__":
    main()
