"""Reading and writing the files of foreign checkpoints."""

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
        path: a `.safetensors` or `.npz` file, or a `.bin` file, a pickled PyTorch state dict; this
            needs PyTorch, and only tensors are unpickled.

    Raises:
        UserError: if the file does not exist, is damaged or of another format, or is a pickle that
            contains anything but tensors.
    """
    readers = {".safetensors": _safetensors, ".bin": _pickle, ".npz": _npz}
    if path.suffix not in readers:
        raise UserError(f"cannot read {path}: tensor files end in {', '.join(readers)}.")
    try:
        return readers[path.suffix](path)
    except (
        *(OSError, EOFError, ValueError),
        *(safetensors.SafetensorError, zipfile.BadZipFile),
    ) as error:
        raise UserError(f"cannot read {path}: {error}.") from error


def find_tensors(directory: Path, *names: str) -> dict[str, np.ndarray]:
    """The tensors of the first of these files that exists in the directory."""
    for name in names:
        if (directory / name).exists():
            return read_tensors(directory / name)
    raise UserError(f"{directory} has no {' or '.join(names)}.")


MODEL = "model.safetensors"
_INDEX = f"{MODEL}.index.json"  # of a model in several files: which tensor is in which


def has_model(directory: Path) -> bool:
    """Whether a directory has the weights of a model, in one file or several; maybe damaged."""
    return any((directory / name).is_file() for name in (MODEL, _INDEX))


def read_model(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a model of Hugging Face, by name, in one file or in several.

    Raises:
        UserError: if a file is missing or damaged, or a tensor is not in the file where the index
            says that it is.
    """
    if not (directory / _INDEX).is_file():
        return read_tensors(directory / MODEL)
    places = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(_is_name(file) for file in places.values()):
        raise UserError(f"{directory / _INDEX} has no weight_map of file names; get it again.")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        found = read_tensors(directory / file)
        if lacking := sorted(k for k, v in places.items() if v == file and k not in found):
            raise UserError(f"{directory / file} lacks {', '.join(lacking)}; get it again.")
        tensors |= found
    return tensors


def model_tensor_names(directory: Path) -> list[str]:
    """The names of a model's tensors, without reading them."""
    if (directory / _INDEX).is_file():
        return list(read_json(directory / _INDEX).get("weight_map", ()))
    with safetensors.safe_open(directory / MODEL, "numpy") as file:
        return list(file.keys())


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file


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
    """Writes `adapter_config.json`, and the tensors to the safetensors file `weights`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / weights, tensors, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    storage.write_text(directory / "adapter_config.json", text + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file atomically.

    Raises:
        UserError: if the file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        with storage.replacing(path) as part:
            safetensors.numpy.save_file(contiguous, part, metadata=dict(metadata))
    except safetensors.SafetensorError as error:  # not an OSError, even if the disk is full
        raise UserError(f"cannot write {path}: {error}.") from error


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    # Through JAX, because safetensors.numpy does not support bfloat16.
    return {name: np.asarray(x) for name, x in safetensors.flax.load_file(path).items()}


def _npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # optional: only pickled checkpoints need it
    except ImportError as error:
        raise UserError(
            f"{path} is a pickle, which only PyTorch can read; pip install torch, or convert it to"
            " safetensors."
        ) from error
    try:
        # weights_only: ordinary unpickling would run any code that the file names.
        with path.open("rb") as file:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path} is refused: it is damaged, or contains something other than tensors, such as"
            " code; get the weights as safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} does not hold a state dict (tensors by name).")
    # NumPy does not support bfloat16.
    return {
        name: (x.float() if x.is_floating_point() else x).numpy() for name, x in tensors.items()
    }
