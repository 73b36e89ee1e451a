"""What a run says while it works: a progress line, JSON lines, TensorBoard; on host 0 only."""

import sys
from typing import Any

import tqdm

from pals_jax.runtime import distributed


def progress(total: int, initial: int, unit: str) -> Any:
    """A progress line with rate and time left on stderr, where no terminal is one in 30 s."""
    return tqdm.tqdm(
        total=total,
        initial=initial,
        unit=unit,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=not distributed.is_main(),
        dynamic_ncols=True,
    )


def say(message: str) -> None:
    """One line for the person at the terminal, beside any progress line."""
    if distributed.is_main():
        tqdm.tqdm.write(message, file=sys.stderr)


def print_table(table: object, width: int | None = None) -> None:
    """Prints a rich table to stderr, for a person: stdout is for machines. Host 0 only."""
    from rich.console import Console

    if distributed.is_main():
        Console(stderr=True, width=width).print(table)


def in_bytes(size: float) -> str:
    """A number of bytes for a person."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
