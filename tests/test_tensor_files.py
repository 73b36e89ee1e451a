"""The files of foreign checkpoints: tensors are read, code in pickles is not run."""

import json
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers

from pals_jax.convert import from_huggingface, huggingface, tensor_files
from pals_jax.runtime.errors import UserError

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


def write(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    tensors = {name: torch.tensor(x).to(dtype) for name, x in TENSORS.items()}
    if path.suffix == ".npz":
        np.savez(path, **TENSORS)
    elif path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    return path


def check_refused(path: Path, *messages: str) -> None:
    with pytest.raises(UserError) as error:
        tensor_files.read_tensors(path)
    for message in (str(path), *messages):
        assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "npz"])
def test_tensors_of_every_format(tmp_path: Path, suffix: str) -> None:
    tensors = tensor_files.read_tensors(write(tmp_path / f"x.{suffix}"))
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, TENSORS[name], strict=True)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_bfloat16(tmp_path: Path, suffix: str) -> None:
    tensors = tensor_files.read_tensors(write(tmp_path / f"x.{suffix}", torch.bfloat16))
    assert tensors["a"].dtype in (np.float32, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors["a"].astype(np.float32), TENSORS["a"])


class Code:
    """What, unpickled, makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "x.bin", tmp_path / "it ran"
    torch.save({"a": Code(trace)}, path, _use_new_zipfile_serialization=zipped)
    check_refused(path, "is refused", "code", "safetensors")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert trace.exists()


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, torch.zeros(2)])
def test_a_pickle_of_something_else(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x.bin")
    check_refused(tmp_path / "x.bin", "does not hold a state dict")


def test_a_pickle_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    check_refused(path, "pip install torch", "safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "npz"])
@pytest.mark.parametrize("size", [0, 7, 200])
def test_truncated_files(tmp_path: Path, suffix: str, size: int) -> None:
    path = write(tmp_path / f"x.{suffix}")
    os.truncate(path, min(size, path.stat().st_size - 1))
    check_refused(path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "npz"])
def test_no_such_file(tmp_path: Path, suffix: str) -> None:
    check_refused(tmp_path / f"x.{suffix}", "cannot read")


def test_an_unknown_format(tmp_path: Path) -> None:
    check_refused(tmp_path / "x.h5", "tensor files end in .safetensors, .bin, .npz")


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([Code(tmp_path / "it ran")], dtype=object))
    check_refused(path, "cannot read")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        tensor_files.read_json(tmp_path / "x.json")


def test_a_written_adapter_reads_back(tmp_path: Path) -> None:
    transposed = {"a": TENSORS["a"].T}  # not contiguous
    tensor_files.write_adapter(tmp_path / "new", {"r": 3}, "x.safetensors", transposed)
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text()) == {"r": 3}
    tensors = tensor_files.find_tensors(tmp_path / "new", "absent.safetensors", "x.safetensors")
    np.testing.assert_array_equal(tensors["a"], transposed["a"])
    with pytest.raises(UserError, match=r"has no y\.bin or z\.bin"):
        tensor_files.find_tensors(tmp_path / "new", "y.bin", "z.bin")


# Models in several files


@pytest.fixture
def sharded(tmp_path: Path, tiny_encoder: Path) -> Path:
    """The tiny encoder as transformers writes large models."""
    model = transformers.AutoModel.from_pretrained(tiny_encoder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8kB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_a_model_in_several_files_is_that_in_one(sharded: Path, tiny_encoder: Path) -> None:
    (_, ours), (_, theirs) = map(from_huggingface, (sharded, tiny_encoder))
    tiny.assert_same(ours["params"], theirs["params"])
    assert huggingface.has_model_files(sharded)
    assert not huggingface.has_classifier(sharded)


def test_files_of_a_model_that_are_missing_or_mixed_up(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    files = sorted(set(places.values()))
    name = next(name for name, file in places.items() if file == files[0])
    for changed, message in (
        ({name: files[1]}, f"{files[1]} lacks {name}; get it again"),
        ({name: "../x.safetensors"}, "has no weight_map of file names"),
        ({name: 3}, "has no weight_map of file names"),
        ({name: "x.safetensors"}, "cannot read .*x.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": places | changed}))
        with pytest.raises(UserError, match=message):
            from_huggingface(sharded)
    index.write_text("{}")
    with pytest.raises(UserError, match="has no weight_map of file names"):
        from_huggingface(sharded)
