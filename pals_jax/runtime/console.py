"""Console output of a run: progress line, messages and tables, on host 0 only."""

import sys
from typing import Any

import tqdm

from pals_jax.runtime import distributed


def progress(total: int, initial: int, unit: str) -> Any:
    """A progress line on stderr, with rate and time left; every 30 s if stderr is no terminal."""
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
    """Prints one line to stderr without disturbing the progress line."""
    if distributed.is_main():
        tqdm.tqdm.write(message, file=sys.stderr)


def print_table(table: object, width: int | None = None) -> None:
    """Prints a rich table to stderr, since stdout is for machine-readable output. Host 0 only."""
    from rich.console import Console

    if distributed.is_main():
        Console(stderr=True, width=width).print(table)


def in_bytes(size: float) -> str:
    """A number of bytes, formatted for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
