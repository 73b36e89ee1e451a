"""The processes of a run, one for each host of a TPU pod, and what they must agree on."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from pals_jax.runtime.accelerators import has_tpu
from pals_jax.runtime.errors import Unavailable, UserError, reason

_CONNECT_SECONDS = 300  # to wait for the other processes of a run


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects this process with the others of its run, where there are any.

    On Cloud TPU VMs and under SLURM the environment says which there are; elsewhere the arguments
    must. It comes before anything else that asks JAX for devices.

    Args:
        coordinator: HOST:PORT of process 0; None: what the environment says.
        processes: their number.
        process: the number of this one.

    Raises:
        UserError: not all three are given, or the environment does not say all.
        Unavailable: they do not find each other.
    """
    if any(x is not None for x in (coordinator, processes, process)):
        if coordinator is None or processes is None or process is None:
            raise UserError("--coordinator, --processes and --process go together; give all three.")
        if not re.fullmatch(r".+:\d+", coordinator) or not 0 <= process < processes:
            raise UserError(
                f"--coordinator={coordinator} is not HOST:PORT, or --process={process} not one of"
                f" {processes} from 0 on."
            )
        where: dict[str, Any] = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }
    elif has_tpu() or _under_slurm():
        where = {}
    else:
        return
    others = f"{processes} processes at {coordinator}" if where else "the other hosts of this run"
    print(f"waiting for {others}, at most {_CONNECT_SECONDS} s", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(**where, initialization_timeout=_CONNECT_SECONDS)
    except (RuntimeError, ValueError) as error:
        kind = UserError if isinstance(error, ValueError) else Unavailable
        raise kind(
            f"the processes of this run did not find each other ({reason(error)})."
        ) from error


def _under_slurm() -> bool:
    # A batch script itself is one process, whatever `srun` would start in it.
    in_step = "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    return in_step and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def is_main() -> bool:
    """Whether this is host 0, the one that logs and writes what is not a checkpoint."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_main(number: int) -> int:
    """What host 0 says, on every host."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(number))


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Ends the program with 143 at SIGTERM, as ever, but cleans up what is half-made."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Preemption:
    """Hears SIGTERM, with which clouds and schedulers announce that they take a machine away.

    One process alone stops at the end of its step. Several agree on one step to stop at, through
    JAX's preemption service, even if only one of them was told.

    Orbax's `CheckpointManager.reached_preemption` asks that service and nothing else. It does not
    run where one process is alone, whose SIGTERM would go unheard.
    """

    def __init__(self) -> None:
        """Hears nothing yet."""
        self._told = False

    def __enter__(self) -> "Preemption":
        # With several processes the signal belongs to JAX's service. Handlers are the main
        # thread's to set.
        self._mine = jax.process_count() == 1
        self._mine &= threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def __exit__(self, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save and stop now, after `step`; to be asked after every step."""
        if jax.process_count() == 1:
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)
