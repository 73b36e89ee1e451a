"""What an experiment on an encoder does differently from one on an encoder-decoder."""

import dataclasses
from pathlib import Path
from typing import Protocol, TypeAlias

from ml_collections import ConfigDict

from pals_jax.data.batches import Layout
from pals_jax.data.pairs import PairEncoder, PairTokenizer
from pals_jax.data.tasks import KNOWN, Output, Task
from pals_jax.data.tokenize import (
    Encoder,
    FastTokenizer,
    SavedTokenizer,
    TextEncoder,
    load_tokenizer,
)
from pals_jax.models.architectures import Architecture
from pals_jax.models.bart import BartConfig
from pals_jax.models.bert import BertConfig
from pals_jax.runtime.errors import UserError

Tokenizer: TypeAlias = FastTokenizer | PairTokenizer


class Family(Protocol):
    """A kind of model, as an experiment needs to know it."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The kinds of answers that it gives."""

    @property
    def layout(self) -> Layout:
        """The tokens that it expects."""

    @property
    def target_cost(self) -> float:
        """The cost of a position of a target relative to one of a text or source; see `Packed`."""

    def max_lengths(self, data: ConfigDict) -> dict[str, int]:
        """The keys of `config.data` with maximum lengths: of a text, or of source and target."""

    def load_tokenizer(self, directory: Path) -> Tokenizer:
        """The tokenizer beside the weights of a model."""

    def read_tokenizer(self, directory: Path) -> Tokenizer:
        """The tokenizer that `save_pretrained` wrote."""

    def text_encoder(self, tokenizer: Tokenizer, task: Task, data: ConfigDict) -> Encoder:
        """Makes tokens of the examples of a task."""


@dataclasses.dataclass(frozen=True)
class EncoderFamily:
    """BERT and RoBERTa: texts in, classes and values out."""

    architecture: BertConfig
    outputs: tuple[Output, ...] = ("classes", "value")
    target_cost: float = 0.0

    @property
    def layout(self) -> Layout:
        """See `Family`."""
        return Layout(self.architecture.pad_token_id, self.architecture.type_vocab_size)

    def max_lengths(self, data: ConfigDict) -> dict[str, int]:
        """See `Family`."""
        return {"max_length": data.max_length}

    def load_tokenizer(self, directory: Path) -> Tokenizer:
        """See `Family`."""
        return load_tokenizer(directory)

    def read_tokenizer(self, directory: Path) -> Tokenizer:
        """See `Family`."""
        return SavedTokenizer.read(directory)

    def text_encoder(self, tokenizer: Tokenizer, task: Task, data: ConfigDict) -> Encoder:
        """See `Family`."""
        del task
        assert not isinstance(tokenizer, PairTokenizer)
        return TextEncoder(tokenizer, data.max_length)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderFamily:
    """BART, mBART and Marian: texts in, texts out."""

    architecture: BartConfig
    outputs: tuple[Output, ...] = ("text",)

    @property
    def layout(self) -> Layout:
        """See `Family`."""
        return Layout(self.architecture.pad_token_id, token_types=0)

    @property
    def target_cost(self) -> float:
        """See `Family`; multiplications by weights, the projection to words included."""
        config, width = self.architecture, self.architecture.d_model
        source = config.encoder_layers * (4 * width + 2 * config.encoder_ffn_dim)
        target = config.decoder_layers * (8 * width + 2 * config.decoder_ffn_dim)
        return (target + config.vocab_size) / source

    def max_lengths(self, data: ConfigDict) -> dict[str, int]:
        """See `Family`."""
        return {name: data[name] for name in ("max_length", "max_target_length")}

    def load_tokenizer(self, directory: Path) -> Tokenizer:
        """See `Family`."""
        config = self.architecture
        # mBART starts with the language code, which is the last token of a target.
        start = None if config.model_type == "mbart" else config.decoder_start_token_id
        return PairTokenizer.load(directory, config.model_type, start)

    read_tokenizer = load_tokenizer

    def text_encoder(self, tokenizer: Tokenizer, task: Task, data: ConfigDict) -> Encoder:
        """See `Family`.

        Raises:
            UserError: the task has language codes that the tokenizer lacks, or the reverse.
        """
        assert isinstance(tokenizer, PairTokenizer)
        languages = task.source_language, task.target_language
        # Those of known tasks are mBART's.
        if task == KNOWN.get(task.name) and tokenizer.model_type != "mbart":
            languages = "", ""
        lengths = data.max_length, data.max_target_length
        try:
            return PairEncoder(tokenizer, *lengths, *languages)
        except UserError as error:
            raise UserError(f"task {task.name}: {error}") from error


def family_of(architecture: Architecture) -> Family:
    """The family of an architecture."""
    if isinstance(architecture, BartConfig):
        return EncoderDecoderFamily(architecture)
    return EncoderFamily(architecture)
