"""The worker's side of side_by_side.Worker. Imports only Python's standard library."""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """The peak memory, in bytes, since `reset`."""

    reset: Callable[[], Any]
    read: Callable[[], int]


def serve(ready: dict[str, Any], do: Callable[..., None], peak: Peak | None = None) -> None:
    """Prints that the worker is ready, then serves requests until standard input ends.

    Args:
        ready: the message to print first.
        do: does the work of one request, and returns when it is done.
        peak: the peak memory to report; by default that of the process.
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
    ctypes.CDLL(None).malloc_trim(0)  # memory used only for the start must not count
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM to the resident memory


def _read_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * int(fields["VmHWM"].split()[0])  # given in kB
