"""Tokenisation of pairs of a source and a target text, for encoder-decoders.

The tokenizers are those of transformers: `tokenizers` alone has no counterpart of Marian's, which
cuts sources and targets by different SentencePiece models, nor of mBART's language codes.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import operator
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from pals_jax.data.examples import Examples
from pals_jax.data.tokenized import TokenizedSplit, TokenizedTargets
from pals_jax.runtime.errors import UserError

_FORMAT = 1  # format version of the cache; increment when the meaning of its content changes
_BATCH = 1000  # texts per call of the tokenizer, to bound memory
# The tokenizer of each `model_type`, unless tokenizer_config.json names another one.
_CLASSES = {"bart": "BartTokenizer", "mbart": "MBartTokenizer", "marian": "MarianTokenizer"}
_GENERATION = "generation_config.json"
_MARIAN_CODE = ">>{}<<"  # a token before the source that names the language of the target


@dataclasses.dataclass(frozen=True, eq=False)
class PairTokenizer:
    """The tokenizer of an encoder-decoder.

    Attributes:
        tokenizer: transformers' BartTokenizer, MBartTokenizer, MarianTokenizer or the like.
        model_type: of the model: bart, mbart or marian.
        start_id: the token that the decoder starts with. None: the last one of the target, as in
            mBART, where it is the language code.
        generation: how the model's own configuration has texts generated, as in the JSON of Hugging
            Face: special tokens, and what the authors of the model recommend.
    """

    tokenizer: Any
    model_type: str
    start_id: int | None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path, model_type: str, start_id: int | None) -> Self:
        """The tokenizer in a directory.

        Raises:
            UserError: if there is none, Marian's lacks sentencepiece, or it is mBART-50's.
        """
        if model_type == "marian" and not importlib.util.find_spec("sentencepiece"):
            raise UserError(
                f"the tokenizer in {directory} needs sentencepiece, which is not here: pip install"
                " it."
            )
        # Silence transformers' advice to install PyTorch, which this package does not need.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers

        declared = _settings(directory / "tokenizer_config.json")
        name = str(declared.get("tokenizer_class", "")).removesuffix("Fast")
        if name == "MBart50Tokenizer":
            raise UserError(
                f"the tokenizer in {directory} is that of mBART-50, which has the language before"
                " its texts; take an mBART that has it behind them, as"
                " facebook/mbart-large-cc25 does."
            )
        kind = getattr(transformers, name, None) or getattr(transformers, _CLASSES[model_type])
        files = kind.vocab_files_names
        needed = files.values() if model_type != "marian" else ("source.spm", "target.spm")
        if not any((directory / file).is_file() for file in needed):
            raise UserError(
                f"there is no tokenizer in {directory}; it needs {' or '.join(needed)}."
            )
        try:
            with warnings.catch_warnings():
                # Marian's asks for sacremoses, which it would not use in tokenising.
                warnings.simplefilter("ignore")
                tokenizer = kind.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # of many kinds, from the file system and the parsers
            raise UserError(f"there is no usable tokenizer in {directory}.") from error
        # Older models have no generation_config.json, and these settings in config.json.
        files = (directory / name for name in ("config.json", _GENERATION))
        generation = functools.reduce(operator.or_, map(_settings, files))
        return cls(tokenizer, model_type, start_id, generation)

    def save_pretrained(self, directory: Path, /) -> None:
        """Writes the files from which `load` makes it again."""
        self.tokenizer.save_pretrained(directory)
        (directory / _GENERATION).write_text(json.dumps(dict(self.generation), indent=2))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a target's tokens, without the special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokenizer)

    def behind_start(self, labels: list[int]) -> list[int]:
        """The tokens of a target behind the one that the decoder starts with."""
        return [labels[-1] if self.start_id is None else self.start_id, *labels]

    @functools.cached_property
    def content(self) -> str:
        """Everything that the tokens of a text depend on, as a digest."""
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(map(Path, self.tokenizer.save_pretrained(folder))):
                if path.suffix == ".spm" or path.name == "vocab.json":
                    digest.update(path.name.encode() + path.read_bytes())
                elif path.name == "tokenizer.json":
                    saved = json.loads(path.read_text())
                    # These follow the last call: the language code, and the length.
                    for state in ("post_processor", "truncation", "padding"):
                        saved.pop(state, None)
                    digest.update(json.dumps(saved, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def languages(self) -> tuple[str, ...]:
        """The codes of the languages that it knows, of sources and targets; empty: it has none."""
        codes = getattr(self.tokenizer, "supported_language_codes", None)  # Marian's
        if codes is not None:
            return tuple(sorted(code.removeprefix(">>").removesuffix("<<") for code in codes))
        return tuple(sorted(getattr(self.tokenizer, "lang_code_to_id", ())))


@dataclasses.dataclass(frozen=True)
class PairEncoder:
    """Makes the tokens of pairs of one task, as the model's own tokenizer does.

    Texts that are too long are truncated at their ends.

    Attributes:
        tokenizer: the tokenizer.
        max_length: the maximum tokens of a source, special tokens included.
        max_target_length: that of a target.
        source_language: the code of the sources' language; empty: none.
        target_language: that of the targets.
    """

    tokenizer: PairTokenizer
    max_length: int
    max_target_length: int
    source_language: str = ""
    target_language: str = ""

    def __post_init__(self) -> None:
        """Refuses codes that the tokenizer has not, and the lack of those that it needs.

        Raises:
            UserError: a code is unknown, missing, or of no use.
        """
        known = self.tokenizer.languages
        of_model = self.tokenizer.model_type
        needed = {
            "source_language": bool(known) and of_model == "mbart",
            "target_language": bool(known),
        }
        for key, is_needed in needed.items():
            code = getattr(self, key)
            if code and not is_needed:
                raise UserError(
                    f"{key} {code!r}: the tokenizer of this {of_model} model has no codes of"
                    f" {key.split('_')[0]} languages; leave it out."
                )
            if is_needed and code not in known:
                what = f"there is no {code!r} in" if code else "a code is missing for"
                raise UserError(f"{key}: {what} the tokenizer, which has {', '.join(known)}.")

    def check(self, examples: Examples) -> None:
        """Checks that the maximum lengths leave room for text.

        Raises:
            UserError: if they do not.
        """
        del examples
        needed = self.tokenizer.tokenizer.num_special_tokens_to_add() + 1
        needed += self._prefix != ""
        for name, length in (
            ("length", self.max_length),
            ("target length", self.max_target_length),
        ):
            if length < needed:
                raise UserError(
                    f"a maximum {name} of {length} tokens is too small: the special tokens and one"
                    f" token of a text need {needed}."
                )

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that the tokens depend on besides the texts."""
        languages = self.source_language, self.target_language
        lengths = self.max_length, self.max_target_length
        return _FORMAT, self.tokenizer.content, self.tokenizer.start_id, *languages, *lengths

    def __call__(self, examples: Examples) -> TokenizedSplit:
        """The tokens of N examples; their targets too, if they have some.

        Raises:
            UserError: if the maximum lengths leave no room for text.
        """
        self.check(examples)
        sources = [self._prefix + text for (text,) in examples.texts]
        tokens, offsets = _joined(self._ids(sources, "text", self.max_length))
        targets = None
        if examples.target_texts is not None:
            labels = self._ids(examples.target_texts, "text_target", self.max_target_length)
            targets = TokenizedTargets(*_joined(map(self.tokenizer.behind_start, labels)))
        return TokenizedSplit(
            tokens=tokens,
            offsets=offsets,
            first=np.diff(offsets).astype(np.int32),
            targets=np.full(len(examples), np.nan, np.float32),
            target_texts=targets,
        )

    @property
    def start_id(self) -> int:
        """The token that the decoder starts with."""
        start = self.tokenizer.start_id
        if start is not None:
            return start
        return int(self.tokenizer.tokenizer.convert_tokens_to_ids(self.target_language))

    @property
    def _prefix(self) -> str:
        """What is before each source."""
        is_marian = self.tokenizer.model_type == "marian" and self.target_language
        return f"{_MARIAN_CODE.format(self.target_language)} " if is_marian else ""

    def _ids(self, texts: list[str], kind: str, max_length: int) -> Iterator[list[int]]:
        """The tokens of texts, of the kind "text" (sources) or "text_target"."""
        tokenizer = self.tokenizer.tokenizer
        if self.tokenizer.model_type == "mbart":
            tokenizer.src_lang, tokenizer.tgt_lang = self.source_language, self.target_language
        # Shown only on a terminal, and only after one second.
        bar = tqdm(total=len(texts), desc="tokenizing", disable=None, delay=1, leave=False)
        with bar:
            for begin in range(0, len(texts), _BATCH):
                batch = texts[begin : begin + _BATCH]
                yield from tokenizer(**{kind: batch}, truncation=True, max_length=max_length)[
                    "input_ids"
                ]
                bar.update(len(batch))


def _settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _joined(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all texts end to end, int32, and the offsets of each, int64 [N + 1]."""
    tokens, lengths = [np.zeros(0, np.int32)], [0]
    for ids in texts:
        tokens.append(np.array(ids, np.int32))
        lengths.append(len(ids))
    return np.concatenate(tokens), np.cumsum(lengths, dtype=np.int64)
