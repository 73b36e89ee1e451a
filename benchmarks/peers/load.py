"""A load of closed loops on a server, with Locust: each client asks again when it is answered.

    python load.py PORT QUESTIONS CLIENTS SECONDS [REQUESTS_PER_SECOND]

QUESTIONS is a file of JSON lines, {"question", "answer"}. Each answer is compared, to 1e-5. Prints
one JSON line: the seconds of all requests after the warm-up, and what failed.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, constant_throughput, task
from locust.env import Environment

PORT, QUESTIONS, CLIENTS, SECONDS, *RATE = sys.argv[1:]
WARM_UP = 3.0  # seconds that do not count
TOLERANCE = 1e-5
asked = [json.loads(line) for line in Path(QUESTIONS).read_text().splitlines()]
began = time.perf_counter()
seconds: list[tuple[float, float]] = []  # when a request began, and how long it took
failures: list[str] = []


def same(found: Any, expected: Any) -> bool:
    """Whether an answer is the expected one."""
    values = [
        list(x["probabilities"].values()) + ([] if x["value"] is None else [x["value"]])
        for x in (found, expected)
    ]
    near = all(abs(a - b) <= TOLERANCE for a, b in zip(*values, strict=True))
    return near and found["task"] == expected["task"]


class Client(FastHttpUser):
    """A client that draws its questions at random."""

    host = f"http://127.0.0.1:{PORT}"
    wait_time = constant_throughput(float(RATE[0]) / int(CLIENTS)) if RATE else constant(0)
    network_timeout = connection_timeout = 60.0

    @task
    def ask(self) -> None:
        """One request."""
        chosen, start = random.choice(asked), time.perf_counter()
        with self.client.post(
            "/v1/predict", json=chosen["question"], catch_response=True
        ) as response:
            took = time.perf_counter() - start
            if response.status_code != 200:
                failures.append(f"{response.status_code} {response.text}")
            elif not same(response.json()["answers"][0][0], chosen["answer"]):
                failures.append(f"{response.text} instead of {chosen['answer']}")
            response.success()
        if start - began > WARM_UP:
            seconds.append((start, took))


def main() -> None:
    """Runs the load and prints what came out."""
    environment = Environment(user_classes=[Client])
    runner = environment.create_local_runner()
    runner.start(int(CLIENTS), spawn_rate=int(CLIENTS))
    time.sleep(WARM_UP + float(SECONDS))  # gevent's
    runner.quit()
    end = began + WARM_UP + float(SECONDS)
    counted = sum(start + took <= end for start, took in seconds)
    print(
        json.dumps(
            {
                "per_second": counted / float(SECONDS),
                "seconds": [took for _, took in seconds],
                "failures": failures[:5],
                "failed": len(failures),
            }
        )
    )


if __name__ == "__main__":
    main()
