"""The tasks that are served: they answer, come and go."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pals_jax.data.tasks import Task
from pals_jax.inference.evaluator import finite
from pals_jax.inference.predict import Prediction, rows_of
from pals_jax.inference.server import batcher
from pals_jax.inference.server.batcher import Batcher, Busy, Item
from pals_jax.inference.server.metrics import Metrics
from pals_jax.inference.texts import Fields, Fitted, fit
from pals_jax.runtime.errors import Diverged, UserError

ALL = "all"  # the name that stands for every task, unless a task has it
MOST_ANSWERS = 1024  # texts times tasks of one request
MOST_WAITING = 2048  # answers of all requests; about half a minute's work of two cores


class Refusal(UserError):  # noqa: N818 - the message describes the error
    """A request that is refused.

    Attributes:
        code: the HTTP status.
        headers: more headers of the response.
    """

    def __init__(self, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Takes the status, one sentence, and headers."""
        super().__init__(message)
        self.code, self.headers = code, dict(headers or {})


class Model(batcher.Model, Protocol):
    """What the service needs of `resident.ResidentModel`."""

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Any]:
        """The tokens of texts; called in several threads."""

    def warm_up(self) -> None:
        """Compiles everything."""

    def read(self, path: Path) -> Any:
        """The `NewTask` of a file."""

    def write(self, row: int, adapters: Any) -> None:
        """Makes these the parameters of a row."""


@dataclasses.dataclass(eq=False)
class _Entry:
    """A task and its row of the task axis, which is free when nobody reads it any more."""

    task: Task
    row: int
    readers: int = 0
    removed: bool = False


class Service:
    """Tasks on one model; all methods are of the event loop's thread."""

    def __init__(
        self, model: Model, tasks: Sequence[Task], max_tasks: int, metrics: Metrics
    ) -> None:
        """Starts nothing yet.

        Args:
            model: the model.
            tasks: those that have its first rows.
            max_tasks: the number of its rows.
            metrics: what is measured.
        """
        self.max_tasks, self.ready = max_tasks, False
        self.model = model
        self._entries = {task.name: _Entry(task, row) for row, task in enumerate(tasks)}
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for row in range(len(tasks), max_tasks):
            self._free.put_nowait(row)
        self._adding = asyncio.Lock()
        self.batcher = Batcher(model, MOST_WAITING, metrics.batch)
        metrics.watch(lambda: self.batcher.waiting, lambda: len(self._entries))

    async def run(self) -> None:
        """Compiles everything, is ready, and answers until it is cancelled."""
        try:
            await self.batcher.alone(self.model.warm_up)
            self.ready = True
            await self.batcher.run()
        finally:
            self.batcher.close()

    @property
    def tasks(self) -> list[Task]:
        """The tasks, the oldest first."""
        return [entry.task for entry in self._entries.values()]

    async def predict(
        self, texts: Sequence[tuple[str, ...]], names: str | Sequence[str]
    ) -> list[list[Prediction]]:
        """For each text or pair the answers of the tasks, in the order of `names`.

        Args:
            texts: texts or pairs.
            names: a task, several, or "all" for those that the texts fit.

        Raises:
            Refusal: if there is no such task, too much is asked at once, or too much is waiting.
            UserError: if the texts do not fit.
        """
        self.check_ready()
        examples = [Fields(f"text {n}", x, " as an array") for n, x in enumerate(texts, 1)]
        entries = self._fitting(names, examples)
        if len(texts) * len(entries) > MOST_ANSWERS:
            raise Refusal(
                413,
                f"{len(texts)} texts for {len(entries)} tasks are more than {MOST_ANSWERS} answers;"
                " divide them among several requests.",
            )
        with self._reading(entries):
            encoded = await asyncio.to_thread(self.model.encode, texts)
            logits = await self._logits([Item(x, e.row) for e in entries for x in encoded])
        return _by_text(entries, texts, logits)

    def _fitting(self, names: str | Sequence[str], examples: Sequence[Fields]) -> list[_Entry]:
        """The entries of these names, which the examples must fit, or all that they fit."""
        if names == ALL and ALL not in self._entries:
            fitted = fit([task for task in self.tasks if task.has_head], examples)
            return [self._entries[task.name] for task in fitted.tasks]
        chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        entries = [self._entry(name) for name in chosen]
        for entry in entries:
            if not entry.task.has_head:
                raise UserError(f"task {entry.task.name} came without a head, and answers nothing.")
            fit([entry.task], examples)
        return entries

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise Refusal(404, f"there is no task {name[:100]!r}; GET /v1/tasks lists the tasks.")
        return self._entries[name]

    @contextlib.contextmanager
    def _reading(self, entries: Sequence[_Entry]) -> Iterator[None]:
        """Keeps the rows of these tasks as they are, even if one is removed meanwhile."""
        for entry in entries:
            entry.readers += 1
        try:
            yield
        finally:
            for entry in entries:
                entry.readers -= 1
                self._free_if_unused(entry)

    def _free_if_unused(self, entry: _Entry) -> None:
        if entry.removed and not entry.readers:
            self._free.put_nowait(entry.row)

    async def _logits(self, items: Sequence[Item]) -> list[np.ndarray]:
        try:
            return await self.batcher.logits(items)
        except Busy as busy:
            headers = {"Retry-After": str(busy.seconds)}
            raise Refusal(503, f"{busy}.", headers) from busy

    def check_ready(self) -> None:
        """Raises Refusal until everything is compiled."""
        if not self.ready:
            raise Refusal(
                503, "programs are being compiled; try again in a moment.", {"Retry-After": "2"}
            )

    async def add(self, path: Path) -> Task:
        """Adds the task of a task file; nothing is compiled, and no answer is lost.

        Raises:
            Refusal: if there is a task of that name, or no room.
            UserError: if the file is not of this model: see `ResidentModel.read`.
        """
        self.check_ready()
        async with self._adding:
            if len(self._entries) == self.max_tasks:
                raise Refusal(
                    409,
                    f"there is room for {self.max_tasks} tasks and all are there; remove one, or"
                    " start the server with a larger --max-tasks.",
                )
            new = await asyncio.to_thread(self.model.read, path)
            name = new.task.name
            if name in self._entries:
                raise Refusal(409, f"there is a task {name!r} already; remove that first.")
            row = await self._free.get()
            try:
                await self.batcher.alone(self.model.write, row, new.adapters)
                await self._try(new.task, row)
            except BaseException:
                self._free.put_nowait(row)
                raise
            self._entries[name] = _Entry(new.task, row)
        return new.task

    async def _try(self, task: Task, row: int) -> None:
        """Refuses a task whose parameters are finite, but not its outputs."""
        (text,) = self.model.encode([("",)])
        (logits,) = await self._logits([Item(text, row)])
        try:
            finite(task, logits[: task.num_outputs])
        except Diverged as error:
            raise UserError(
                f"task {task.name}: its parameters are so large that outputs are not finite."
            ) from error

    def remove(self, name: str) -> None:
        """Removes a task; what already waits for it is still answered.

        Raises:
            Refusal: if there is no such task, or it is the only one.
        """
        entry = self._entry(name)
        if len(self._entries) == 1:
            raise Refusal(409, f"{name} is the only task; there is always at least one.")
        del self._entries[name]
        entry.removed = True
        self._free_if_unused(entry)


def _by_text(
    entries: Sequence[_Entry], texts: Sequence[tuple[str, ...]], logits: Sequence[np.ndarray]
) -> list[list[Prediction]]:
    """For each text the predictions of the tasks, given the logits of each task's texts."""
    count, answers = len(texts), []
    for i, entry in enumerate(entries):
        task = entry.task
        mine = np.stack(logits[i * count : (i + 1) * count])[:, : task.num_outputs]
        columns = task.columns(len(texts[0]))
        answers.append(rows_of(Fitted([task], columns, list(texts)), [finite(task, mine)]))
    return [list(rows) for rows in zip(*answers, strict=True)]
