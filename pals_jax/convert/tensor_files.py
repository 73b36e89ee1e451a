"""The files that foreign checkpoints consist of."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

from pals_jax.runtime import storage
from pals_jax.runtime.errors import UserError


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, by name.

    Args:
        path: `.safetensors`; `.bin`, a pickled PyTorch state dict, which needs PyTorch and of which
            nothing but tensors is unpickled; or `.npz`.

    Raises:
        UserError: no such file, another format, damage, a pickle with anything but tensors.
    """
    readers = {".safetensors": _safetensors, ".bin": _pickle, ".npz": _npz}
    if path.suffix not in readers:
        raise UserError(f"cannot read {path}: tensors come as {', '.join(readers)}.")
    try:
        return readers[path.suffix](path)
    except (
        *(OSError, EOFError, ValueError),
        *(safetensors.SafetensorError, zipfile.BadZipFile),
    ) as error:
        raise UserError(f"cannot read {path}: {error}.") from error


def find_tensors(directory: Path, *names: str) -> dict[str, np.ndarray]:
    """The tensors of the first of several files that a directory has."""
    for name in names:
        if (directory / name).exists():
            return read_tensors(directory / name)
    raise UserError(f"{directory} has no {' or '.join(names)}.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def write_adapter(
    directory: Path, config: Mapping[str, Any], weights: str, tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes `adapter_config.json`, and the tensors as safetensors to the file `weights`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / weights, tensors, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    storage.write_text(directory / "adapter_config.json", text + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        with storage.replacing(path) as part:
            safetensors.numpy.save_file(contiguous, part, metadata=dict(metadata))
    except safetensors.SafetensorError as error:  # which is no OSError, even for a full disk
        raise UserError(f"cannot write {path}: {error}.") from error


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    # By way of JAX, which knows bfloat16.
    return {name: np.asarray(x) for name, x in safetensors.flax.load_file(path).items()}


def _npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # needed for nothing else
    except ImportError as error:
        raise UserError(
            f"{path} is a pickle, which only PyTorch reads; pip install torch, or convert it to"
            " safetensors."
        ) from error
    try:
        # Other unpickling runs whatever code the file names.
        with path.open("rb") as file:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path} is refused: it is damaged, or holds something else than tensors, such as code;"
            " get the weights as safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} does not hold a state dict, tensors by name.")
    # NumPy knows no bfloat16.
    return {
        name: (x.float() if x.is_floating_point() else x).numpy() for name, x in tensors.items()
    }
