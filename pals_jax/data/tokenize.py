"""Tokenisation of examples, cached on disk."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm

from pals_jax.data.examples import Examples
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.runtime import storage
from pals_jax.runtime.errors import UserError

_FORMAT = 1  # format version of the cache; increment when the meaning of its content changes
# The usual tokenizer classes, each with the `model_type` to which transformers assigns it.
_CLASSES = {
    "BertTokenizer": "bert",
    "RobertaTokenizer": "roberta",
    "XLMRobertaTokenizer": "xlm-roberta",
}
_BATCH = 1000  # examples per call of the tokenizer, to bound memory


class FastTokenizer(Protocol):
    """What is used of a tokenizer; transformers' fast ones and `SavedTokenizer` have it."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer itself."""

    @property
    def split_special_tokens(self) -> bool:
        """Whether a text that names a special token is split like any other."""

    @property
    def truncation_side(self) -> str:
        """The end from which long texts lose tokens: left or right."""

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of special tokens around one text or two."""

    def save_pretrained(self, directory: Path, /) -> Any:
        """Writes the files from which `load_tokenizer` makes it again."""

    def __len__(self) -> int:
        """The number of tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class SavedTokenizer:
    """A tokenizer from the files that transformers wrote, read without transformers.

    It makes the same tokens, and spares the seconds of that import.

    Attributes:
        files: the content of every file, by name.
        backend_tokenizer: see `FastTokenizer`.
        split_special_tokens: see `FastTokenizer`.
        truncation_side: see `FastTokenizer`.
    """

    files: Mapping[str, bytes]
    backend_tokenizer: Tokenizer
    split_special_tokens: bool
    truncation_side: str

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The tokenizer in a directory that `save_pretrained` wrote.

        Raises:
            UserError: if a file is missing or damaged.
        """
        try:
            files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
            backend = Tokenizer.from_buffer(files["tokenizer.json"])
            options = json.loads(files["tokenizer_config.json"])
            split = options.get("split_special_tokens", False)
            return cls(files, backend, split, options.get("truncation_side", "right"))
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise UserError(f"there is no usable tokenizer in {directory}.") from error

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """See `FastTokenizer`."""
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    def save_pretrained(self, directory: Path, /) -> None:
        """See `FastTokenizer`."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)

    def __len__(self) -> int:
        """See `FastTokenizer`."""
        return self.backend_tokenizer.get_vocab_size()


def load_tokenizer(name: str | Path) -> FastTokenizer:
    """The fast tokenizer of a checkpoint.

    Args:
        name: a directory, which is read without network access, or a hub id. A directory may hold
            `vocab.txt` alone, as Google's do.

    Raises:
        UserError: if there is no tokenizer, or it is not a fast one.
    """
    # Silence transformers' advice to install PyTorch, which this package does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast  # takes most of a second to import

    local = Path(name).is_dir()
    try:
        if local and has_tokenizer(Path(name)) == "vocab.txt":
            tokenizer = _word_pieces(Path(name) / "vocab.txt")
        else:
            load = _tokenizer_class(Path(name)).from_pretrained
            tokenizer = load(str(name), local_files_only=local)
    except Exception as error:  # of many kinds, from the hub, the file system and the parsers
        hint = "" if local else ", which is no directory and cannot be fetched from the hub"
        raise UserError(f"there is no usable tokenizer in {name}{hint}.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {name} is not a fast one; a tokenizer.json is needed.")
    # Without any vocabulary, transformers makes up an empty one where config.json names the model.
    vocabularies = type(tokenizer).vocab_files_names.values()
    if local and not any((Path(name) / file).is_file() for file in vocabularies):
        raise UserError(f"there is no tokenizer in {name}; it needs {' or '.join(vocabularies)}.")
    return tokenizer


def has_tokenizer(directory: Path) -> str | None:
    """The file that makes a directory one with a tokenizer; None if there is no such file."""
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt")
    return next((name for name in names if (directory / name).is_file()), None)


def _word_pieces(vocabulary: Path) -> Any:
    """BERT's tokenizer of a vocabulary, which is cased if any of its words has a capital."""
    from transformers import BertTokenizer

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    is_cased = any(word != word.lower() for word in words if not word.startswith("["))
    return BertTokenizer(vocab=str(vocabulary), do_lower_case=not is_cased)


def _tokenizer_class(directory: Path) -> Any:
    """The class that transformers' `AutoTokenizer` would choose, or `AutoTokenizer` if in doubt.

    `AutoTokenizer` imports torch if it is installed, which takes two seconds; the classes do not.
    """
    import transformers

    try:
        declared = json.loads((directory / "tokenizer_config.json").read_text())
        name = declared["tokenizer_class"].removesuffix("Fast")
        config = directory / "config.json"
        model = json.loads(config.read_text())["model_type"] if config.exists() else _CLASSES[name]
        if _CLASSES[name] == model and "auto_map" not in declared:
            return getattr(transformers, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # AutoTokenizer knows all formats, and reports what is wrong
    return transformers.AutoTokenizer


class TextEncoder:
    """Makes the tokens of examples, again and again, equal to those of a tokenizer's `__call__`.

    A pair that is too long is truncated from the end of its longer text, token by token, as in
    BERT's code. One difference: if the room is odd and both texts exceed half of it, BERT's code
    gives the odd token to the first text, `tokenizers` to the longer one, or the second if equal.
    """

    def __init__(self, tokenizer: FastTokenizer, max_length: int) -> None:
        """Takes a tokenizer in any state of truncation and padding.

        Args:
            tokenizer: the checkpoint's.
            max_length: the maximum tokens of an example, special tokens included.
        """
        self._tokenizer, self._max_length = tokenizer, max_length

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that the tokens depend on besides the texts."""
        return _FORMAT, self.backend.to_str(), self.backend.encode_special_tokens

    @functools.cached_property
    def backend(self) -> Tokenizer:
        """A copy that truncates and does not pad; making it takes a tenth of a second."""
        backend = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        backend.no_padding()
        backend.enable_truncation(self._max_length, direction=self._tokenizer.truncation_side)
        return backend

    def check(self, examples: Examples) -> None:
        """Checks that the maximum length leaves room for text.

        Raises:
            UserError: if it does not.
        """
        parts = max(map(len, examples.texts), default=1)
        needed = self._tokenizer.num_special_tokens_to_add(pair=parts == 2) + parts
        if self._max_length < needed:
            raise UserError(
                f"a maximum length of {self._max_length} tokens is too small: the special tokens"
                f" and one token of each text need {needed}."
            )

    def __call__(self, examples: Examples) -> TokenizedSplit:
        """The tokens of N examples.

        Raises:
            UserError: if the maximum length leaves no room for text.
        """
        self.check(examples)
        return _encode(examples, self.backend)


def encode(examples: Examples, tokenizer: FastTokenizer, max_length: int) -> TokenizedSplit:
    """The tokens of examples, once: see `TextEncoder`.

    Raises:
        UserError: if `max_length` leaves no room for text.
    """
    return TextEncoder(tokenizer, max_length)(examples)


class Encoder(Protocol):
    """Makes the tokens of examples: `TextEncoder`, or `pals_jax.data.pairs.PairEncoder`."""

    def check(self, examples: Examples) -> None:
        """Raises UserError if the maximum length leaves no room for text."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that the tokens depend on besides the texts."""

    def __call__(self, examples: Examples) -> TokenizedSplit:
        """The tokens of N examples."""


def tokenize_split(
    examples: Examples, tokenizer: FastTokenizer, max_length: int, cache_dir: Path
) -> TokenizedSplit:
    """Like `encode`, but from the cache: see `encode_once`."""
    return encode_once(examples, TextEncoder(tokenizer, max_length), cache_dir)


def encode_once(examples: Examples, encoder: Encoder, cache_dir: Path) -> TokenizedSplit:
    """The tokens of examples, from the cache, which is filled if needed.

    The cache is a directory per split, named by a hash of texts, targets, tokenizer and length. It
    is built in a temporary folder and then renamed, so several processes may build it at once, and
    a killed one leaves only a folder `building-*`, which is never read.

    Raises:
        UserError: as for the encoder, or if the cache cannot be written.
    """
    encoder.check(examples)
    directory = Path(cache_dir) / _digest(examples, encoder.key)
    if not directory.is_dir():
        split = encoder(examples)
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            _save_atomically(split, directory)
        except OSError as error:
            raise UserError(f"cannot write the cache {cache_dir}: {error}.") from error
    return TokenizedSplit.load(directory)


def _encode(examples: Examples, backend: Tokenizer) -> TokenizedSplit:
    tokens = [np.zeros(0, np.int32)]
    lengths, first = [0], []
    for encoding in _encodings(examples.texts, backend):
        tokens.append(np.array(encoding.ids, np.int32))
        lengths.append(len(encoding.ids))
        first.append(encoding.type_ids.count(0))
    return TokenizedSplit(
        tokens=np.concatenate(tokens),
        offsets=np.cumsum(lengths, dtype=np.int64),
        first=np.array(first, np.int32),
        targets=_targets(examples),
    )


def _encodings(texts: list[tuple[str, ...]], backend: Tokenizer) -> Iterator[Encoding]:
    # Shown only on a terminal, and only after one second.
    bar = tqdm(total=len(texts), desc="tokenizing", disable=None, delay=1, leave=False)
    with bar:
        for begin in range(0, len(texts), _BATCH):
            batch = texts[begin : begin + _BATCH]
            yield from backend.encode_batch_fast([t[0] if len(t) == 1 else t for t in batch])
            bar.update(len(batch))


def _targets(examples: Examples) -> np.ndarray:
    if examples.targets is None:
        return np.full(len(examples), np.nan, np.float32)
    return examples.targets


def _digest(examples: Examples, key: tuple[Any, ...]) -> str:
    digest = hashlib.sha256()
    for part in itertools.chain(key, examples.texts, examples.target_texts or ()):
        digest.update(json.dumps(part).encode() + b"\n")
    digest.update(_targets(examples).tobytes())
    return digest.hexdigest()


def _save_atomically(split: TokenizedSplit, directory: Path) -> None:
    try:
        with storage.replacing(directory) as built:
            split.save(built)
    except OSError:
        if not directory.is_dir():  # else another process was first, with the same content
            raise
