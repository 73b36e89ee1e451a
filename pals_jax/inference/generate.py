"""Texts for sources of any length: the sources' buckets, and the calls that they make.

A call is of the smallest bucket that its longest source fits, and shorter ones fill its rows,
several in one; each bucket is one program, compiled once. So most steps attend to few positions.
Texts that need more room than their bucket has are computed again: many in the next bucket; few,
which tend to be the longest by far, after all others in a last bucket with few slots.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from pals_jax.data.packing import Packed
from pals_jax.inference.generation.config import GenerationConfig
from pals_jax.inference.generation.program import Texts, make_generate
from pals_jax.inference.generation.sources import Sources
from pals_jax.models.adapters.spec import prompt_length
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.task_rows import check_task_ids
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel

LENGTHS = (32, 64, 128, 256, 512)  # of the rows of a bucket; the longest are the model's own
_POSITIONS = 4096  # at least, of the rows of a call, whose keys and values are kept
_SOURCES_PER_ROW = 4  # of a call, at most, on average
_FEWER = 4  # the last bucket has a quarter of the others' slots


class _Bucket(NamedTuple):
    """What a program is compiled for, on each device.

    Attributes:
        length: J, of the rows of sources.
        room: L, the most tokens of a text.
        slots: S, how many sources a step continues.
    """

    length: int
    room: int
    slots: int

    @property
    def rows(self) -> int:
        """R, the rows of sources of a call."""
        return max(self.slots, _POSITIONS // self.length)

    @property
    def size(self) -> int:
        """N, the most sources of a call, which share these rows."""
        return self.rows * _SOURCES_PER_ROW


# Of some sources, their indices and `program.Texts`.
_Call: TypeAlias = Callable[[int, list[int]], tuple[np.ndarray, Texts]]


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

    def __init__(
        self,
        model: Seq2SeqModel,
        config: GenerationConfig,
        rows: int = 32,
        parallel: DataParallel | None = None,
    ) -> None:
        """Args:
        model: the model.
        config: the settings of the search.
        rows: about how many live texts a step computes on a device, num_beams for each source.
        parallel: the devices, which divide the sources; each host gets all texts. None: one device.

        Raises:
            UserError: texts of `max_length` are longer than the model's positions, or a token of
                the settings is not in its vocabulary.
        """
        config.check(model.config)
        positions, longest = model.config.max_length, config.max_length
        self.model, self.config = model, config
        self._parallel = parallel or DataParallel.over(jax.local_devices()[:1])
        slots = max(1, rows // config.num_beams)
        short = [length for length in LENGTHS if length < positions]
        self._buckets = (
            *(_Bucket(length, min(longest, 2 * length), slots) for length in short),
            _Bucket(positions, longest, slots),
            _Bucket(positions, longest, max(1, slots // _FEWER)),
        )
        self._programs: dict[int, Any] = {}

    def __call__(
        self,
        variables: optax.Params,
        sources: Sequence[Sequence[int] | np.ndarray],
        task_ids: int | Sequence[int] | np.ndarray = 0,
        start: int | Sequence[int] | np.ndarray | None = None,
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
        if tasks.size and (tasks == tasks.flat[0]).all():
            # A step takes longer where each source has a task of its own.
            tasks = np.asarray(tasks.flat[0])
        begin = self.config.decoder_start_token_id if start is None else start
        starts = np.broadcast_to(np.asarray(begin, np.int32), len(sources))
        check_task_ids(self.model.num_tasks, *tasks.reshape(-1).tolist())
        lengths = [len(source) for source in sources]
        waiting: list[list[int]] = [[] for _ in self._buckets]
        for index in sorted(range(len(sources)), key=lambda index: -lengths[index]):
            waiting[self._bucket(index, lengths[index])].append(index)

        def call(bucket: int, chosen: list[int]) -> tuple[np.ndarray, Texts]:
            order = self._divided(bucket, chosen)
            mine = self._parallel.shards.mine(len(order))
            here = order[mine]
            given = [
                self._packed(bucket, shard[shard >= 0], sources, starts, tasks) for shard in here
            ]
            stacked = jax.tree.map(lambda *x: np.stack(x), *given)
            return order.reshape(-1), jax.device_get(self._program(bucket)(variables, stacked))

        return self._generate(
            waiting, np.array(lengths), np.broadcast_to(tasks, len(sources)), call
        )

    def _generate(
        self, waiting: list[list[int]], lengths: np.ndarray, tasks: np.ndarray, call: _Call
    ) -> Iterator[Generated]:
        """The texts, by `call` for some sources of a bucket; `waiting` has those of each bucket."""
        while any(waiting):
            bucket, chosen = self._next_call(waiting, lengths, tasks)
            order, texts = call(bucket, chosen)
            outgrown = []
            for index, tokens, score, ended in zip(order.tolist(), *texts, strict=True):
                if index >= 0 and ended:
                    yield Generated(index, self._cut(tokens), float(score))
                elif index >= 0:
                    outgrown.append(index)
            are_few = len(outgrown) <= self._buckets[-1].slots * self._parallel.shards.total
            waiting[-1 if are_few else bucket + 1] += outgrown

    def _divided(self, bucket: int, chosen: list[int]) -> np.ndarray:
        """The sources of a call in the order of the devices, [devices, N]; -1 where there is none.

        They are dealt out in turn, so that each device has as many long ones.
        """
        devices = self._parallel.shards.total
        order = np.full((devices, self._buckets[bucket].size), -1)
        order.T.flat[: len(chosen)] = chosen
        return order

    def _next_call(
        self, waiting: list[list[int]], lengths: np.ndarray, tasks: np.ndarray
    ) -> tuple[int, list[int]]:
        """The bucket of the next call, and its sources, which are taken from `waiting`.

        It is the one of the longest rows that has sources waiting; the last comes after all others.
        Shorter sources fill the call, to keep the slots busy while the longest text is written.
        """
        last = len(waiting) - 1
        bucket = max((i for i, indices in enumerate(waiting[:last]) if indices), default=last)
        order = [index for indices in reversed(waiting[: bucket + 1]) for index in indices]
        chosen = order[: self._buckets[bucket].size * self._parallel.shards.total]
        while not self._fit(bucket, chosen, lengths, tasks):  # known only after packing
            chosen = chosen[: len(chosen) * 7 // 8]
        left = set(order) - set(chosen)
        for i in range(bucket + 1):
            waiting[i] = [index for index in waiting[i] if index in left]
        return bucket, chosen

    def _fit(self, bucket: int, chosen: list[int], lengths: np.ndarray, tasks: np.ndarray) -> bool:
        """Whether the rows of each device hold these sources."""
        order = self._divided(bucket, chosen)
        shards = [shard[shard >= 0] for shard in order]
        return self._packing(bucket).holds(*((tasks[s], lengths[s]) for s in shards if s.size))

    def _packing(self, bucket: int) -> Packed:
        """How a device packs the sources of a call."""
        shape = self._buckets[bucket].rows, self._buckets[bucket].length
        return Packed.into(*shape, prompts=prompt_length(self.model.method))

    @property
    def compilations(self) -> int:
        """How many programs have been compiled."""
        return sum(program._cache_size() for program in self._programs.values())

    def _bucket(self, index: int, length: int) -> int:
        """The index of the smallest bucket for a source of a length."""
        most = self._buckets[-1].length
        if not 0 < length <= most:
            raise UserError(
                f"source {index} has {length} tokens; give from 1 to {most}, which is as many as"
                " the model has positions."
            )
        return next(i for i, bucket in enumerate(self._buckets) if length <= bucket.length)

    def _program(self, bucket: int) -> Any:
        """The compiled program of a bucket."""
        if bucket not in self._programs:
            _, room, slots = self._buckets[bucket]
            axis_name = self._parallel.axis_name
            program = make_generate(self.model, self.config, slots, room, axis_name)
            self._programs[bucket] = self._parallel.compile(program)
        return self._programs[bucket]

    def _packed(
        self,
        bucket: int,
        chosen: np.ndarray,
        sources: Sequence[Sequence[int] | np.ndarray],
        starts: np.ndarray,
        tasks: np.ndarray,
    ) -> Sources:
        """Of all sources those that are chosen for one device, for a call of a bucket's program."""
        return Sources.packed(
            [sources[i] for i in chosen],
            starts[chosen],
            tasks[chosen] if tasks.ndim else tasks,
            self._buckets[bucket].size,
            self._packing(bucket),
            self.config.pad_token_id,
        )

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        """The text without the padding behind it."""
        # The start token may be the same as the end token.
        (ends,) = np.nonzero(tokens[1:] == self.config.eos_token_id)
        return tokens[: ends[0] + 2] if len(ends) else tokens


def generate(
    model: Seq2SeqModel,
    variables: optax.Params,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    task_ids: int | np.ndarray,
    **settings: Any,
) -> np.ndarray:
    """The best text for each of B sources, on one device.

    Repeated calls with a model and settings use the programs of the first one.

    Args:
        model: the model.
        variables: its variables.
        input_ids: int [B, J]; the sources.
        attention_mask: int [B, J]; 1, then 0 at padding.
        task_ids: int, a scalar, [B], or [G] with G dividing B: the task of each of G equal,
            consecutive groups of sources.
        **settings: the fields of `GenerationConfig`; `max_length`, `decoder_start_token_id`,
            `eos_token_id` and `pad_token_id` are needed.

    Returns:
        int32 [B, max_length]; from the start token to the end token, then padding.

    Raises:
        UserError: a setting is out of range, there is padding before a token, a source is empty or
            longer than the model's positions, or there is no such task.
    """
    generator = _generator(model, GenerationConfig(**settings))
    mask = np.asarray(attention_mask) != 0
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise UserError("a source has padding before a token; put all padding behind the tokens.")
    sources = [row[seen].tolist() for row, seen in zip(np.asarray(input_ids), mask, strict=True)]
    tasks = np.asarray(task_ids, np.int32)
    if tasks.ndim:
        tasks = np.repeat(tasks, len(sources) // len(tasks))
    out = np.full(
        (len(sources), generator.config.max_length), generator.config.pad_token_id, np.int32
    )
    for text in generator(variables, sources, tasks):
        out[text.source, : len(text.tokens)] = text.tokens
    return out


@functools.lru_cache(maxsize=8)
def _generator(model: Seq2SeqModel, config: GenerationConfig) -> Generator:
    return Generator(model, config)
