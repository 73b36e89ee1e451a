"""Computes what requests of any tasks wait for together, a batch at a time.

The event loop's thread keeps the queue; one other thread computes.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

WINDOW = 0.002  # seconds that the first item waits for others when nothing is being computed
_SMOOTHING = 0.1  # the weight of the last batch in the mean pace

Result = TypeVar("Result")


class Item(NamedTuple):
    """A text to answer for a task.

    Attributes:
        text: as the model's `encode` gives it.
        row: the task's row on the model's task axis.
    """

    text: Any
    row: int


class Plan(Protocol):
    """The next batch."""

    @property
    def chosen(self) -> Sequence[int]:
        """The indices of its items among those that wait."""


class Model(Protocol):
    """What computes the batches; `compute` is called in one thread only."""

    def choose(self, waiting: Sequence[Item]) -> Any:
        """The `Plan` of the next batch, given what waits, the oldest first."""

    def compute(self, plan: Any) -> Iterable[Any]:
        """The logits of the chosen items."""


class Busy(Exception):  # noqa: N818 - not an error of the program
    """The queue is full.

    Attributes:
        seconds: after which to try again.
    """

    def __init__(self, seconds: int) -> None:
        """Takes the seconds."""
        super().__init__(f"too much is waiting; try again in {seconds} s")
        self.seconds = seconds


class _Request:
    """The items of one request and what is known of their logits."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.logits: list[Any] = [None] * len(items)
        self.left = len(items)
        self.done: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()

    def deliver(self, index: int, logits: np.ndarray) -> None:
        self.logits[index] = logits
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(self.logits)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Batcher:
    """The queue of a model, and the thread that computes."""

    def __init__(
        self, model: Model, capacity: int, observe: Callable[[int, float], None] | None = None
    ) -> None:
        """Starts nothing yet.

        Args:
            model: the model.
            capacity: the number of items that may wait.
            observe: told the number of items and the seconds of each batch.
        """
        self._model, self._capacity = model, capacity
        self._observe = observe or (lambda items, seconds: None)
        self._waiting: list[tuple[_Request, int]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._pace = 0.0  # the mean seconds per item

    @property
    def waiting(self) -> int:
        """The number of items that wait."""
        return len(self._waiting)

    async def logits(self, items: Sequence[Item]) -> list[np.ndarray]:
        """The logits of each item; whoever stops waiting for them takes their items away.

        Raises:
            Busy: if there is no room for them in the queue.
        """
        if self.waiting + len(items) > self._capacity:
            raise Busy(max(1, math.ceil(self.waiting * self._pace)))
        request = _Request(items)
        self._waiting += [(request, index) for index in range(len(items))]
        self._arrived.set()
        try:
            return await request.done
        finally:
            if request.left:
                self._waiting = [entry for entry in self._waiting if entry[0] is not request]

    async def alone(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls a function in the thread that computes, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def run(self) -> None:
        """Computes batch after batch, until it is cancelled."""
        while True:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                await asyncio.sleep(WINDOW)
            if self._waiting:  # unless all have gone away meanwhile
                await self._compute_next()

    async def _compute_next(self) -> None:
        waiting = self._waiting
        plan = self._model.choose([request.items[index] for request, index in waiting])
        chosen = set(plan.chosen)
        self._waiting = [entry for i, entry in enumerate(waiting) if i not in chosen]
        batch = [waiting[i] for i in plan.chosen]
        began = time.perf_counter()
        try:
            logits = await self.alone(self._model.compute, plan)
        except Exception as error:  # whatever it is, only these requests have failed
            for request, _ in batch:
                request.fail(error)
            return
        seconds = time.perf_counter() - began
        pace = seconds / len(batch)
        self._pace += (pace - self._pace) * (_SMOOTHING if self._pace else 1.0)
        self._observe(len(batch), seconds)
        for (request, index), values in zip(batch, logits, strict=True):
            request.deliver(index, values)

    def close(self) -> None:
        """Ends the thread, after the batch that it computes."""
        self._thread.shutdown()
