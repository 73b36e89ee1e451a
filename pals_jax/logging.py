"""What a run says while it works: a progress line, JSON lines, TensorBoard; on host 0 only."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm


class MetricWriter:
    """Scalars by step, to `metrics.jsonl` and `tensorboard/` of the workdir."""

    def __init__(self, workdir: Path, start: int) -> None:
        """Opens the files; lines of steps after `start`, which will be taken again, are dropped."""
        self._main = jax.process_index() == 0
        if not self._main:
            return
        path = workdir / "metrics.jsonl"
        part = workdir / "metrics.jsonl.part"
        part.write_text("".join(_lines_until(path, start)))
        part.rename(path)
        self._file = path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start + 1 if start else None
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line and one TensorBoard point for each scalar."""
        if not self._main:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            self._file.close()
            self._board.close()


class Window:
    """The steps since the last line of metrics; their scalars stay on the device until then."""

    def __init__(self) -> None:
        """An empty window that begins now."""
        self._clear()

    def _clear(self) -> None:
        self._began = time.monotonic()
        self._scalars: list[Mapping[str, jax.Array]] = []
        self._examples = 0

    def add(self, scalars: Mapping[str, jax.Array], examples: int) -> None:
        """One step."""
        self._scalars.append(scalars)
        self._examples += examples

    def flush(self) -> dict[str, float]:
        """The means of the scalars and the examples per second; begins anew."""
        steps = jax.device_get(self._scalars)
        means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        rate = self._examples / (time.monotonic() - self._began)
        self._clear()
        return means | {"examples_per_second": rate}


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """The lines of steps up to `step`; a run that was killed may have left half of one."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue
        if keep:
            yield line + "\n"


def progress(total: int, initial: int, unit: str) -> Any:
    """A progress line with rate and time left on stderr, where no terminal is one in 30 s."""
    return tqdm.tqdm(
        total=total,
        initial=initial,
        unit=unit,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=jax.process_index() != 0,
        dynamic_ncols=True,
    )


def say(message: str) -> None:
    """One line for the person at the terminal, beside any progress line."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(message, file=sys.stderr)
