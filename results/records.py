"""One JSON file for each run: what was trained, where, and what it answers on every dev example."""

import base64
import functools
import json
import os
import platform
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pals_jax.runtime.errors import UserError

FORMAT = 1
PAGES = Path(__file__).resolve().parents[1] / "docs" / "results"
VERSIONED = (
    *("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "transformers"),
    "sacrebleu",
)

# task -> split -> [N], class ids, values in [0, 1], or texts
Answers = dict[str, dict[str, np.ndarray]]
# What else a record may have: by how much the parameters of earlier tasks changed at most, and what
# `ablate` finds.
EARLIER, ABLATION = "largest_change_of_earlier_tasks", "change_without_layers"
_TEXTS = "json"  # takes the place of a dtype


def run_file(device: str, arm: str, tasks: Sequence[str], seed: int, pages: Path = PAGES) -> Path:
    """Where the record of a run is."""
    return pages / "runs" / device / arm / "+".join(tasks) / f"{seed}.json"


def dev_file(task: str, pages: Path = PAGES) -> Path:
    """Where the right answers of a task's dev examples are."""
    return pages / "dev" / f"{task}.json"


def encode(values: np.ndarray) -> str:
    """An array as text: uint8 for class ids, float32, or JSON for texts; compressed, in base64."""
    if values.dtype.kind == "U":
        dtype, content = _TEXTS, json.dumps(values.tolist(), ensure_ascii=False).encode()
    else:
        dtype = "u1" if np.array_equal(values, values.astype(np.uint8)) else "<f4"
        content = values.astype(dtype).tobytes()
    packed = zlib.compress(content, 9)
    return f"{dtype}:{base64.b64encode(packed).decode('ascii')}"


def decode(text: str) -> np.ndarray:
    """The inverse of `encode`."""
    dtype, _, packed = text.partition(":")
    content = zlib.decompress(base64.b64decode(packed))
    return np.array(json.loads(content)) if dtype == _TEXTS else np.frombuffer(content, dtype)


def encode_all(answers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, str]]:
    """`encode` of each task's splits."""
    return {task: {s: encode(x) for s, x in splits.items()} for task, splits in answers.items()}


def decode_all(texts: Mapping[str, Mapping[str, str]]) -> Answers:
    """The inverse of `encode_all`."""
    return {task: {s: decode(x) for s, x in splits.items()} for task, splits in texts.items()}


@functools.cache
def provenance() -> dict[str, Any]:
    """The commit, versions and processor of this process, as they are at the first call."""
    from importlib.metadata import version

    import jax

    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
        "processor": _cpu() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
    }


def _commit() -> str:
    """The commit of the checkout, with "+" if files that matter have changed since.

    That of a bundle, which is no checkout, is in its file COMMIT.
    """
    root = Path(__file__).resolve().parents[1]
    if (root / "COMMIT").exists():
        return (root / "COMMIT").read_text().strip()
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changed = [*git, "status", "--porcelain", "--", "pals_jax", "results"]
        return head + ("+" if subprocess.check_output(changed, text=True).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else ()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a record whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # another process may write it, too
    partial.write_text(json.dumps({"format": FORMAT, **content}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def check(path: Path, record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses the record of a run with other settings than the claims file now has.

    Raises:
        UserError: they differ.
    """
    if record["settings"] != settings:
        raise UserError(
            f"{path} is of a run with the settings {record['settings']}, but the claims file now"
            f" has {dict(settings)}; remove the file to run it again, or undo the change."
        )


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        UserError: it is not JSON, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the record of a run: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(
            f"{path} has the format {found!r}, not {FORMAT}; use the commit that wrote it, or"
            " remove the file to run it again."
        )
    return content
