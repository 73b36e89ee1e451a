"""Texts for sources of any length: the sources' buckets, and the calls that they make.

A source is computed in the smallest bucket that it fits; each bucket is one program, compiled once.
A text that needs more room than its bucket has is computed again in the next one. So most steps
attend to few positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax

from pals_jax.inference.generation.config import GenerationConfig
from pals_jax.inference.generation.program import Sources, Texts, make_generate
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.task_rows import check_task_ids
from pals_jax.runtime.errors import UserError

LENGTHS = (16, 32, 64, 128, 256, 512)  # of the sources of a bucket; the last has the model's own
_POSITIONS = 8192  # of the sources of one call, whose keys and values are kept
_LEAST_ROOM = 64  # tokens that a text has room for in any bucket


class Generated(NamedTuple):
    """The text for one source.

    Attributes:
        source: the index of the source.
        tokens: int [L]; from the start token to the end token.
        score: log p / n^length_penalty.
    """

    source: int
    tokens: np.ndarray
    score: float


class Generator:
    """Generates texts with a model and its settings; it keeps the programs that are compiled."""

    def __init__(self, model: Seq2SeqModel, config: GenerationConfig, rows: int = 32) -> None:
        """Args:
        model: the model.
        config: the settings of the search.
        rows: about how many live texts a step computes, num_beams for each source.

        Raises:
            UserError: texts of `max_length` are longer than the model's positions, or a token of
                the settings is not in its vocabulary.
        """
        positions = model.config.max_length
        if config.max_length > positions:
            raise UserError(
                f"max_length {config.max_length} of the generation is above the {positions}"
                " positions of the decoder; lower it."
            )
        for name, token in config.token_ids().items():
            if not 0 <= token < model.config.vocab_size:
                raise UserError(
                    f"{name} {token} of the generation is not among the {model.config.vocab_size}"
                    " tokens of the model; correct it."
                )
        self.model, self.config = model, config
        self._slots = max(1, rows // config.num_beams)
        self._lengths = (*(length for length in LENGTHS if length < positions), positions)
        self._programs: dict[int, Any] = {}

    def __call__(
        self,
        variables: optax.Params,
        sources: Sequence[Sequence[int]],
        task_ids: int | Sequence[int] = 0,
        start: int | Sequence[int] | None = None,
    ) -> Iterator[Generated]:
        """The best text for each source, in the order in which calls of a program give them.

        Args:
            variables: the model's.
            sources: the tokens of each source, its end token included.
            task_ids: the task of all sources, or of each.
            start: the token that all texts, or each, begin with; None: the settings'.

        Raises:
            UserError: a source is empty or longer than the model's positions, or there is no such
                task.
        """
        tasks = np.asarray(task_ids, np.int32)
        begin = self.config.decoder_start_token_id if start is None else start
        starts = np.broadcast_to(np.asarray(begin, np.int32), len(sources))
        check_task_ids(self.model.num_tasks, *tasks.reshape(-1).tolist())
        lengths = [len(source) for source in sources]
        waiting: list[list[int]] = [[] for _ in self._lengths]
        for index in sorted(range(len(sources)), key=lambda index: -lengths[index]):
            waiting[self._bucket(index, lengths[index])].append(index)

        def call(bucket: int, chosen: list[int]) -> Texts:
            size = self._size(bucket)
            ids, mask = self._padded_sources([sources[i] for i in chosen], bucket)
            start, present = _padded(starts[chosen], size), np.array(len(chosen), np.int32)
            of_each = tasks if tasks.ndim == 0 else _padded(tasks[chosen], size)
            given = Sources(ids, mask, start, present, of_each)
            return cast(Texts, jax.device_get(self._program(bucket)(variables, given)))

        return self._generate(waiting, lengths, call)

    def _generate(
        self,
        waiting: list[list[int]],
        lengths: Sequence[int],
        call: Callable[[int, list[int]], Texts],
    ) -> Iterator[Generated]:
        """The texts, by `call` for some sources of a bucket; `waiting` has those of each bucket."""
        while any(waiting):
            bucket, chosen = self._next_call(waiting, lengths)
            for index, tokens, score, ended in zip(chosen, *call(bucket, chosen), strict=False):
                if ended:
                    yield Generated(index, self._cut(tokens), float(score))
                else:
                    waiting[bucket + 1].append(index)

    def _next_call(self, waiting: list[list[int]], lengths: Sequence[int]) -> tuple[int, list[int]]:
        """The longest bucket that has sources waiting, and those that are computed next.

        Shorter ones come along, to keep the slots busy while the longest text is written.
        """
        bucket = max(bucket for bucket, indices in enumerate(waiting) if indices)
        size, enough = self._size(bucket), self._slots * lengths[waiting[bucket][0]]
        chosen: list[int] = []
        for indices in reversed(waiting[: bucket + 1]):
            while indices and len(chosen) < size:
                if indices is not waiting[bucket] and sum(lengths[i] for i in chosen) >= enough:
                    break
                chosen.append(indices.pop(0))
        return bucket, chosen

    @property
    def compilations(self) -> int:
        """How many programs have been compiled."""
        return sum(program._cache_size() for program in self._programs.values())

    def _bucket(self, index: int, length: int) -> int:
        """The index of the smallest bucket for a source of a length."""
        if not 0 < length <= self._lengths[-1]:
            raise UserError(
                f"source {index} has {length} tokens; give from 1 to {self._lengths[-1]}, which is"
                " as many as the model has positions."
            )
        return next(bucket for bucket, most in enumerate(self._lengths) if length <= most)

    def _size(self, bucket: int) -> int:
        """N of a bucket's program, a multiple of its slots."""
        return self._slots * max(1, _POSITIONS // self._lengths[bucket] // self._slots)

    def _program(self, bucket: int) -> Any:
        """The compiled program of a bucket."""
        if bucket not in self._programs:
            longest, is_last = self.config.max_length, bucket == len(self._lengths) - 1
            room = longest if is_last else min(longest, max(_LEAST_ROOM, 2 * self._lengths[bucket]))
            program = make_generate(self.model, self.config, self._slots, room)
            self._programs[bucket] = jax.jit(program)
        return self._programs[bucket]

    def _padded_sources(
        self, sources: Sequence[Sequence[int]], bucket: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sources of a call of a bucket's program and their mask, int [N, J] both."""
        ids = np.full((self._size(bucket), self._lengths[bucket]), self.config.pad_token_id)
        mask = np.zeros_like(ids)
        for row, source in enumerate(sources):
            ids[row, : len(source)], mask[row, : len(source)] = source, 1
        return ids.astype(np.int32), mask.astype(np.int32)

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        """The text without the padding behind it."""
        # The start token may be the same as the end token.
        (ends,) = np.nonzero(tokens[1:] == self.config.eos_token_id)
        return tokens[: ends[0] + 2] if len(ends) else tokens


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """[n] -> [size]."""
    return np.pad(values, (0, size - len(values)))
