"""The time to the first answer for one text, in the shell and in Python, and to the next ones.

    python benchmarks/answers.py --workdir=runs/demo --task=sentiment

Every first answer is in a new process, with the compiled programs of an earlier one kept on disk;
the medians of five. Prints one JSON line of seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

TEXT = "The soup was cold and the waiter was rude."
NOTEBOOK = """
import json, sys, time
began = time.perf_counter()
import pals_jax
run = pals_jax.load(sys.argv[1])
times = []
for _ in range(101):
    run.predict(sys.argv[3], task=sys.argv[2])
    times.append(time.perf_counter() - began)
    began = time.perf_counter()
print(json.dumps(times))
"""


def main() -> None:
    """Times the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="a run")
    parser.add_argument("--task", required=True, help="one of its tasks, for one text")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pals_jax", "predict"]
    command += [f"--workdir={args.workdir}", f"--task={args.task}"]
    notebook = [sys.executable, "-c", NOTEBOOK, args.workdir, args.task, TEXT]
    _run(command)  # compiles
    commands = [_run(command)[0] for _ in range(5)]
    times = [json.loads(_run(notebook)[1]) for _ in range(5)]
    seconds = {
        "pals-jax predict": statistics.median(commands),
        "load and predict": statistics.median(first for first, *_ in times),
        "next answer": statistics.median(t for _, *rest in times for t in rest),
    }
    print(json.dumps({name: round(value, 4) for name, value in seconds.items()}))


def _run(command: list[str]) -> tuple[float, str]:
    """The seconds of a process, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(command, input=TEXT, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


if __name__ == "__main__":
    main()
