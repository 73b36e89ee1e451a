"""How texts are generated: lengths, beams, and what a text may not contain."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pals_jax.convert.tensor_files import read_json
from pals_jax.models.bart import BartConfig
from pals_jax.runtime.errors import UserError

# Settings of transformers that are not held, with the values that turn them off.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": ([],),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The settings of a search, under the names of Hugging Face's generation_config.json.

    Lengths count all tokens of a text, the start token and the end token included.

    Attributes:
        decoder_start_token_id: the token that every text begins with.
        eos_token_id: the token that ends a text.
        pad_token_id: what follows it.
        max_length: the most tokens of a text; with it, every search ends.
        min_length: the fewest tokens before the end token.
        num_beams: K, the live texts of each source; 1 is greedy search.
        length_penalty: a text of n tokens, without its end, scores log p / n^length_penalty.
        early_stopping: when a source is done that has K ended texts. True: at once. False: when no
            live text scores better than these, as it is. "original": when no text of the last step
            does, ended ones included, as in the version of transformers that He et al. use (4.9).
        no_repeat_ngram_size: no n tokens occur twice in a text; 0 allows it.
        forced_bos_token_id: the first token after the start token.
        forced_eos_token_id: the last token of a text of `max_length`.
        suppress_tokens: tokens that no text contains.
        renormalize_logits: whether the probabilities of the tokens that are allowed sum to one, or
            those of all tokens.
    """

    decoder_start_token_id: int
    eos_token_id: int
    pad_token_id: int
    max_length: int
    min_length: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["original"] = False
    no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    renormalize_logits: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("num_beams", 1),
            ("max_length", 2),
            ("min_length", 0),
            ("no_repeat_ngram_size", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(
                    f"{name} of the generation must be a whole number from {least}, not {value!r}."
                )
        if self.min_length >= self.max_length:
            raise UserError(
                f"min_length {self.min_length} of the generation is not below its max_length"
                f" {self.max_length}; lower one or raise the other."
            )
        if self.early_stopping not in (True, False, "original"):
            raise UserError(
                "early_stopping of the generation is True, False or 'original', not"
                f" {self.early_stopping!r}."
            )

    def check(self, architecture: BartConfig) -> None:
        """Checks that a model can write such texts.

        Raises:
            UserError: texts of `max_length` are longer than its positions, or a token of the
                settings is not in its vocabulary.
        """
        positions = architecture.max_length
        if self.max_length > positions:
            raise UserError(
                f"max_length {self.max_length} of the generation is above the {positions}"
                " positions of the decoder; lower it."
            )
        for name, token in self.token_ids().items():
            if not 0 <= token < architecture.vocab_size:
                raise UserError(
                    f"{name} {token} of the generation is not among the {architecture.vocab_size}"
                    " tokens of the model; correct it."
                )

    def token_ids(self) -> dict[str, int]:
        """The single tokens among the settings, by name."""
        return {
            name: token
            for name, token in dataclasses.asdict(self).items()
            if name.endswith("token_id") and token is not None
        }

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "GenerationConfig":
        """The settings in the JSON of Hugging Face; those that are absent or null have defaults.

        Raises:
            UserError: there is one that is not held, or a needed one is missing.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        for name in _OFF.keys() & given.keys():
            if given[name] not in _OFF[name]:
                raise UserError(
                    f"{name} {given[name]!r} of the model's generation settings is not supported;"
                    " remove it."
                )
        words = given.get("bad_words_ids", [])
        if longer := [word for word in words if len(word) != 1]:
            raise UserError(
                f"bad_words_ids of the model's generation settings has {longer[0]}, of several"
                " tokens; only single tokens are supported."
            )
        suppressed = {*given.get("suppress_tokens", ()), *(token for (token,) in words)}
        fields = {field.name for field in dataclasses.fields(cls)}
        named = {name: value for name, value in given.items() if name in fields}
        needed = ("decoder_start_token_id", "eos_token_id", "pad_token_id", "max_length")
        if missing := [name for name in needed if name not in named]:
            raise UserError(f"the model's generation settings have no {missing[0]}; add it.")
        return cls(**named | {"suppress_tokens": tuple(sorted(suppressed))})


def read_generation_config(directory: Path, **changes: Any) -> GenerationConfig:
    """The settings that a directory of Hugging Face recommends, with `changes`.

    They are in `generation_config.json` or, of older models, in `config.json`.

    Raises:
        UserError: see `GenerationConfig.from_mapping`.
    """
    settings = read_json(directory / "config.json")
    if (path := directory / "generation_config.json").exists():
        settings |= read_json(path)
    return GenerationConfig.from_mapping(settings | changes)
