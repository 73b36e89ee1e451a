"""What a machine without a network needs to run the claims, in files of a stated size.

    python -m results bundle --data=DIR --out=BUNDLE --device=gpu
    cat BUNDLE/part.* | tar -x && bash claims/run --hours=8    # there

Code, wheels of all packages for this version of Python, data, and weights in float16. Only Python
is needed there, of the same version and on the same kind of machine.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from pals_jax.convert import huggingface
from pals_jax.runtime.console import in_bytes, say
from pals_jax.runtime.errors import UserError
from results.jobs import DATA, REPOSITORY, check_data

ENCODER = "all-MiniLM-L6-v2"
EXTRA = {"cpu": "", "gpu": "[gpu]"}

_RUN = """#!/usr/bin/env bash
# Installs everything once, then runs the claims; its options are those of `python -m results run`.
set -euo pipefail
cd "$(dirname "$0")"
[ -e .venv/installed ] || {{
  python3 -m venv .venv
  .venv/bin/pip install -q --no-index --find-links=wheels "pals_jax{extra}"
  touch .venv/installed
}}
cd code
PYTHONPATH=. exec ../.venv/bin/python -m results run --data=../data --device={device} "$@"
"""


class Parts(io.RawIOBase):
    """A writer of part.000, part.001, ..., each of at most `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """Appends the bytes of `data`, as far as the current part has room."""
        number, begun = divmod(self.written, self.size)
        chunk = memoryview(data)[: self.size - begun]  # type: ignore[arg-type]
        with (self.folder / f"part.{number:03}").open("ab") as part:
            part.write(chunk)
        self.written += len(chunk)
        return len(chunk)


def make(data: Path, out: Path, device: str, part_size: int) -> None:
    """Writes the parts into `out`, which must not exist.

    Args:
        data: the directory that results/config.py and results/translation.py read.
        out: the directory of the parts.
        device: "cpu" or "gpu": what the wheels are for.
        part_size: the largest size of a part, in bytes.

    Raises:
        UserError: data are missing, `out` exists, or a package cannot be had.
    """
    check_data(data)
    if part_size < 1:
        raise UserError(f"parts of {part_size} bytes hold nothing; give --part-mib at least 1.")
    if out.exists():
        raise UserError(f"{out} is there already; name a directory that does not exist.")
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        claims, parts = Path(scratch) / "claims", Path(scratch) / "parts"
        claims.mkdir()
        parts.mkdir()
        _gather(data, claims, device)
        writer = io.BufferedWriter(Parts(parts, part_size), 2**20)
        with writer, tarfile.open(fileobj=writer, mode="w|") as tar:
            tar.add(claims, "claims")
        sizes = [path.stat().st_size for path in parts.iterdir()]
        os.rename(parts, out)
    say(f"{out} has {len(sizes)} parts, {in_bytes(sum(sizes))}; to run them, on the other machine:")
    say("  cat part.* | tar -x && bash claims/run --plan")


def _gather(data: Path, claims: Path, device: str) -> None:
    say("gathering code, data and weights")
    code = claims / "code"
    code.mkdir()
    git = ["git", "-C", str(REPOSITORY)]
    archive = subprocess.run([*git, "archive", "HEAD"], check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=code, input=archive.stdout, check=True)
    (code / "COMMIT").write_bytes(subprocess.check_output([*git, "rev-parse", "HEAD"]))
    for folder in DATA:
        shutil.copytree(data / folder, claims / "data" / folder)
    _write_half(huggingface.resolve(ENCODER), claims / "data" / "encoder")
    (claims / "run").write_text(_RUN.format(device=device, extra=EXTRA[device]))
    say("fetching wheels of all packages")
    wheels = [sys.executable, "-m", "pip", "wheel", "-q", "-w", str(claims / "wheels")]
    if subprocess.run([*wheels, f"{REPOSITORY}{EXTRA[device]}"], check=False).returncode:
        raise UserError("a package cannot be had; pip says above which.")


def _write_half(encoder: Path, folder: Path) -> None:
    """A copy of an encoder's directory with weights in float16."""
    shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    tensors = load_file(encoder / "model.safetensors")
    half = {
        name: x.astype(np.float16) if x.dtype == np.float32 else x for name, x in tensors.items()
    }
    save_file(half, folder / "model.safetensors", {"format": "pt"})
