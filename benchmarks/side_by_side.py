"""Times several programs that do the same work, in turns, on one machine.

Each program is a process with its own environment. It reads requests for parts of the work from its
standard input, one JSON object per line, and answers how long they took. While one program works,
the others wait. The published figure is the ratio within each round, because a machine's speed
varies between rounds.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from tqdm import tqdm

PEERS = Path(__file__).resolve().parent / "peers"


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment with these requirements; creates it if missing."""
    home = PEERS / ".environments" / name
    python = home / "bin" / "python"
    if not (home / "done").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
        (home / "done").touch()
    return python


class Worker:
    """A process that does parts of the work on request."""

    def __init__(self, script: Path, work: Path, python: Path = Path(sys.executable)) -> None:
        """Starts `script` with the folder `work`, which describes the work; waits until ready."""
        self._process = subprocess.Popen(
            [python, script, work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the process to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The worker's answer."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} has ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclasses.dataclass(frozen=True)
class Timing:
    """The times of several workers for the same work; the others are compared with the first.

    Attributes:
        seconds: the seconds of each round, by name.
        peaks: the peak memory during the work, in bytes, by name.
        examples: the number of examples in a round.
    """

    seconds: Mapping[str, list[float]]
    peaks: Mapping[str, int]
    examples: int

    def summary(self) -> dict[str, Any]:
        """Median rates, and the median, lowest and highest ratio of the first's rate to others'."""
        ours, *others = self.seconds
        ratios = {
            name: [a / b for a, b in zip(self._rates(ours), self._rates(name), strict=True)]
            for name in others
        }
        totals = {name: sum(seconds) for name, seconds in self.seconds.items()}
        return {
            "times_as_fast_in_all": {name: totals[name] / totals[ours] for name in others},
            "examples_per_second": {
                name: statistics.median(self._rates(name)) for name in self.seconds
            },
            "times_as_fast": {
                name: {"median": statistics.median(r), "lowest": min(r), "highest": max(r)}
                for name, r in ratios.items()
            },
            "peak_bytes": dict(self.peaks),
            "seconds": {name: list(seconds) for name, seconds in self.seconds.items()},
            "rounds": len(self.seconds[ours]),
            "examples_per_round": self.examples,
        }

    def draw(self, axes: Any, title: str) -> None:
        """Draws the median rates as bars and each round as a dot."""
        for place, name in enumerate(self.seconds):
            rates = self._rates(name)
            axes.barh(place, statistics.median(rates), color="C7" if place else "C0")
            axes.plot(rates, [place] * len(rates), "k.", markersize=3)
        axes.set_yticks(range(len(self.seconds)), list(self.seconds))
        axes.invert_yaxis()
        axes.set_xlabel("examples per second")
        axes.set_title(title, loc="left")

    def _rates(self, name: str) -> list[float]:
        return [self.examples / seconds for seconds in self.seconds[name]]


def plot(path: Path, timings: Mapping[str, Timing], columns: int = 1) -> None:
    """Writes a figure with one titled panel for each timing."""
    rows, bars = -(-len(timings) // columns), max(len(t.seconds) for t in timings.values())
    size = 7 * columns, (0.6 * bars + 1.4) * rows
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes in panels.flat[len(timings) :]:
        axes.set_axis_off()
    for axes, (title, timing) in zip(panels.flat, timings.items(), strict=False):
        timing.draw(axes, title)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", dpi=120)


def run(
    workers: Mapping[str, Callable[..., dict[str, Any]]], rounds: int, steps: int, batch_size: int
) -> Timing:
    """Times all workers; in each round they take the same steps, one worker after the other.

    Args:
        workers: by name, a function like `Worker.ask` that runs the steps from `begin` to `end`.
        rounds: the number of rounds.
        steps: the number of steps in each round; no step comes twice.
        batch_size: the number of examples in a step.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in tqdm(range(rounds), unit="round"):
        for name, ask in workers.items():
            answers[name].append(ask(begin=number * steps, end=(number + 1) * steps))
    seconds = {name: [answer["seconds"] for answer in given] for name, given in answers.items()}
    peaks = {name: max(answer["peak"] for answer in given) for name, given in answers.items()}
    return Timing(seconds, peaks, steps * batch_size)
