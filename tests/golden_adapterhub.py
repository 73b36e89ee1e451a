"""The golden directories: outputs of AdapterHub's library 1.3.0 (shared/README.md)."""

from pathlib import Path
from types import SimpleNamespace


def place(shared: Path, folder: Path, architecture: str, method: str) -> SimpleNamespace:
    """A golden directory, with its encoder as Hugging Face would have it."""
    source = shared / "golden" / "adapterhub" / architecture / method
    base = folder / "base"
    base.mkdir()
    (base / "config.json").symlink_to(source / "config.json")
    (base / "model.safetensors").symlink_to(source / "base.safetensors")
    return SimpleNamespace(source=source, base=base, method=method)
