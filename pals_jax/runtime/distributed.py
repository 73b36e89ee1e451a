"""The processes of a run (one per host of a TPU pod) and their coordination."""

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
from pals_jax.runtime.errors import Preempted, Unavailable, UserError, reason

_CONNECT_SECONDS = 300  # timeout for connecting to the other processes of a run


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects this process to the others of its run, if there are any.

    On Cloud TPU VMs and under SLURM the environment describes the processes; elsewhere the
    arguments must. Must be called before anything asks JAX for devices.

    Args:
        coordinator: HOST:PORT of process 0; None: taken from the environment.
        processes: the number of processes.
        process: the index of this process.

    Raises:
        UserError: if only some of the arguments are given, or the environment is incomplete.
        Unavailable: if the processes do not find each other in time.
    """
    if any(x is not None for x in (coordinator, processes, process)):
        if coordinator is None or processes is None or process is None:
            raise UserError("--coordinator, --processes and --process go together; give all three.")
        if not re.fullmatch(r".+:\d+", coordinator) or not 0 <= process < processes:
            raise UserError(
                f"--coordinator={coordinator} is not HOST:PORT, or --process={process} is not from"
                f" 0 to {processes - 1}."
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
    # A batch script is a single process; only steps started by `srun` have several.
    in_step = "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    return in_step and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def is_main() -> bool:
    """Whether this is host 0, which logs and writes everything except checkpoints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_main(number: int) -> int:
    """The number that host 0 passed, on every host."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(number))


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into `sys.exit(143)`, so that context managers can clean up."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Preemption:
    """Listens for SIGTERM, which clouds and schedulers send before they take a machine away.

    A single process stops at the end of its step. Several processes agree on the step to stop at
    through JAX's preemption service, even if only one of them received the signal.

    Orbax's `CheckpointManager.reached_preemption` only asks that service, which does not run for a
    single process: its SIGTERM would go unnoticed.
    """

    told = False  # whether the signal has come, and nothing has stopped because of it yet

    def __enter__(self) -> "Preemption":
        Preemption.told = False
        # With several processes JAX's service handles the signal. Only the main thread may set
        # signal handlers.
        self._mine = jax.process_count() == 1
        self._mine &= threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def _tell(self, number: int, frame: FrameType | None) -> None:
        Preemption.told = True

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGTERM, self._before)
        if error:
            Preemption.told = False

    def reached(self, step: int) -> bool:
        """Whether to save and stop now, after `step`; must be called after every step."""
        if jax.process_count() == 1:
            return Preemption.told
        return multihost_utils.reached_preemption_sync_point(step)


def stop_between_runs() -> None:
    """Raises Preempted if the last run was told to stop too late for a step to notice it."""
    if Preemption.told:
        Preemption.told = False
        raise Preempted("told to stop between two runs; to go on, run the same command again.")
