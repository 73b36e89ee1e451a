"""Metrics of a run by step, as JSON lines and TensorBoard, on host 0 only.

`clu.metric_writers` is not used: it writes TensorBoard files with TensorFlow, and does not drop the
lines that a resumed run writes again.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from pals_jax.runtime import distributed, storage


class MetricWriter:
    """Writes scalars by step to `metrics.jsonl` and `tensorboard/` in the workdir."""

    def __init__(self, workdir: epath.Path, start: int) -> None:
        """Opens the files; drops lines of steps after `start`, which will be repeated."""
        self._main = distributed.is_main()
        if not self._main:
            return
        import tensorboardX  # takes most of a second to import

        kept = "".join(_lines_until(workdir / "metrics.jsonl", start))
        self._folder = storage.Staged(workdir)
        path = self._folder.path / "metrics.jsonl"
        storage.write_text(path, kept)
        self._file = path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(
            str(self._folder.path / "tensorboard"), purge_step=start + 1 if start else None
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one JSON line, and one TensorBoard point per scalar."""
        if not self._main:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flushes everything written so far to the workdir.

        Raises:
            UserError: if the upload to a bucket fails.
        """
        if self._main:
            self._board.flush()
            self._folder.deliver()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._main:
            self._file.close()
            self._board.close()
            self._folder.__exit__(*error)


class Window:
    """The steps since the last line of metrics; their scalars stay on the device until `flush`."""

    def __init__(self) -> None:
        """Starts an empty window."""
        self._clear()

    def _clear(self) -> None:
        self._began = time.monotonic()
        self._scalars: list[Mapping[str, jax.Array]] = []
        self._examples = 0

    def add(self, scalars: Mapping[str, jax.Array], examples: int) -> None:
        """Adds one step."""
        self._scalars.append(scalars)
        self._examples += examples

    def flush(self) -> tuple[dict[str, np.ndarray], float]:
        """The scalars of the window's n steps, [n] each, and examples per second; then resets."""
        steps = jax.device_get(self._scalars)
        scalars = {name: np.array([step[name] for step in steps]) for name in steps[0]}
        rate = self._examples / (time.monotonic() - self._began)
        self._clear()
        return scalars, rate


def _lines_until(path: epath.Path, step: int) -> Iterator[str]:
    """The lines of steps up to `step`; skips a partial line left by a killed run."""
    with storage.reported(path):
        lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue
        if keep:
            yield line + "\n"
