"""What is measured, for Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ANSWERS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        """Begins at zero."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "pals_jax_requests", "Requests.", ["method", "route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "pals_jax_request_seconds",
            "Seconds from a request to its response.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch_answers = Histogram(
            "pals_jax_batch_answers",
            "Answers that were computed together.",
            buckets=_ANSWERS,
            registry=registry,
        )
        self._batch_seconds = Histogram(
            "pals_jax_batch_seconds",
            "Seconds of computing a batch.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._waiting = Gauge("pals_jax_waiting_answers", "Answers that wait.", registry=registry)
        self._tasks = Gauge("pals_jax_tasks", "Tasks.", registry=registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(method, route, status).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def batch(self, answers: int, seconds: float) -> None:
        """A batch was computed."""
        self._batch_answers.observe(answers)
        self._batch_seconds.observe(seconds)

    def watch(self, waiting: Callable[[], int], tasks: Callable[[], int]) -> None:
        """Where to look for what is there at the moment."""
        self._waiting.set_function(waiting)
        self._tasks.set_function(tasks)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
