"""The figures of a run, by step: JSON lines and TensorBoard, on host 0 only.

`clu.metric_writers` writes TensorBoard's files with TensorFlow, which nothing here needs, and drops
no lines that a run which goes on will write again.
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
    """Scalars by step, to `metrics.jsonl` and `tensorboard/` of the workdir."""

    def __init__(self, workdir: epath.Path, start: int) -> None:
        """Opens the files; lines of steps after `start`, which will be taken again, are dropped."""
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
        """One line and one TensorBoard point for each scalar."""
        if not self._main:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Returns when all that was written is in the workdir.

        Raises:
            UserError: it is in a bucket that does not take it.
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

    def flush(self) -> tuple[dict[str, np.ndarray], float]:
        """The scalars of its steps, [n] each, and the examples per second; begins anew."""
        steps = jax.device_get(self._scalars)
        scalars = {name: np.array([step[name] for step in steps]) for name in steps[0]}
        rate = self._examples / (time.monotonic() - self._began)
        self._clear()
        return scalars, rate


def _lines_until(path: epath.Path, step: int) -> Iterator[str]:
    """The lines of steps up to `step`; a run that was killed may have left half of one."""
    with storage.reported(path):
        lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue
        if keep:
            yield line + "\n"
