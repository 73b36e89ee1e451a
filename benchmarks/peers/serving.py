"""The worker's side of side_by_side.Worker. Needs nothing but Python: every environment runs it."""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """The largest amount of memory, in bytes, that was in use since `reset`."""

    reset: Callable[[], Any]
    read: Callable[[], int]


def serve(ready: dict[str, Any], do: Callable[..., None], peak: Peak | None = None) -> None:
    """Says that it is ready, then does what it is asked for, until no one asks any more.

    Args:
        ready: what to say.
        do: takes a question, and returns when all is done.
        peak: of the memory that counts; by default the process's.
    """
    print(json.dumps(ready), flush=True)
    memory = peak or Peak(_reset_resident, _read_resident)
    for line in sys.stdin:
        memory.reset()
        began = time.perf_counter()
        do(**json.loads(line))
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "peak": memory.read()}), flush=True)


def _reset_resident() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # what was taken for the start is not the steps'
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM falls to what is resident now


def _read_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * int(fields["VmHWM"].split()[0])  # given in kB
