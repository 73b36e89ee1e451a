"""Generation on the device: the encoder once per source, then a loop of steps of the decoder.

The loop has a few slots, each with the search for one source. When a search is done, the next
source takes its slot, so that short texts do not wait for long ones. Positions therefore differ
between slots, but all slots write to the same place of the key-value cache, which is a ring. Nor do
beams move in the cache: a live text knows in which beam each of its positions was computed.

Dimension letters: see `pals_jax.models.layers`; S slots, N sources in R rows, K beams, L tokens of
a text.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from pals_jax.inference.generation.config import GenerationConfig
from pals_jax.inference.generation.constraints import constrain
from pals_jax.inference.generation.search import Search, advance
from pals_jax.inference.generation.sources import Sources
from pals_jax.models import kv_cache
from pals_jax.models.segments import Packing
from pals_jax.models.seq2seq import ReadSource, Seq2SeqModel
from pals_jax.models.stack import unstacked

_BLOCK = 512  # positions of the sources that are read at a time


class Texts(NamedTuple):
    """The best text for each source.

    Attributes:
        tokens: int [N, L]; from the start token to the end token, then padding.
        scores: float32 [N]; log p / n^length_penalty of each.
        ended: bool [N]; False: the text needs more room than L tokens.
    """

    tokens: Array
    scores: Array
    ended: Array


class _State(NamedTuple):
    """The state of the loop.

    Attributes:
        place: int scalar; where in the ring of the cache the next keys go, from 0 to L - 1.
        search: leaves [S, ...].
        beam_at: int [S, K, L]; for each live text and place of the ring, the beam in which the
            text's position there was computed.
        source: int [S]; the source of each slot, N if it has none.
        read: leaves [S, ...]; what the steps need of it.
        entries: leaves [S, ...]; of the cache, but for the step before.
        left: leaves [S, ...]; what that step has left for it.
        dealt: int scalar; how many sources have had a slot.
        texts: the texts so far.
    """

    place: Array
    search: Search
    beam_at: Array
    source: Array
    read: ReadSource
    entries: Any
    left: Any
    dealt: Array
    texts: Texts


def make_generate(
    model: Seq2SeqModel,
    config: GenerationConfig,
    slots: int,
    room: int,
    axis_name: str | None = None,
) -> Callable[[optax.Params, Sources], Texts]:
    """The pure function from variables and sources to their texts.

    Args:
        model: the model.
        config: the settings of the search.
        slots: S, the number of sources in a step.
        room: L, the most tokens of a text.
        axis_name: of the devices, each with its own sources; every device returns the texts of all
            of them, in device order. None: there is one device.
    """

    def generate(variables: optax.Params, sources: Sources) -> Texts:
        layers = unstacked(variables["params"]["decoder"]["layers"])
        words = cast(Array, model.apply(variables, method="words"))
        loop = _Loop(model, config, slots, room, variables, layers, words, sources)
        texts = loop.texts()
        return texts if axis_name is None else lax.all_gather(texts, axis_name, tiled=True)

    return generate


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The loop, while it is traced.

    Attributes, beside the arguments above, are what is computed once for all steps: `layers` of the
    decoder, `unstacked`, and the `words` of the vocabulary.
    """

    model: Seq2SeqModel
    config: GenerationConfig
    slots: int
    room: int
    variables: optax.Params
    layers: tuple[Any, ...]
    words: Array
    sources: Sources

    @property
    def none(self) -> int:
        """N, the index of no source."""
        return len(self.sources.start)

    def texts(self) -> Texts:
        """The texts for all sources."""
        read = self._read_all()
        state = self._deal(self._first_state(read), read)
        return lax.while_loop(
            lambda state: (state.source < self.none).any(),
            lambda state: self._deal(self._collect(self._step(state)), read),
            state,
        ).texts

    def _apply(self, method: str, *inputs: Any) -> Any:
        return self.model.apply(self.variables, *inputs, method=method)

    def _read_all(self) -> ReadSource:
        """What the steps need of the rows of sources, leaves [R, ...]; read in blocks of rows."""
        sources, task_ids = self.sources, self.sources.row_tasks()
        rows, length = sources.input_ids.shape
        size = min(rows, max(1, _BLOCK // length))

        def block_of(x: Any, first: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, first, size)

        def read_block(first: Array) -> ReadSource:
            texts = (block_of(x, first) for x in (sources.input_ids, sources.segment_ids))
            tasks = block_of(task_ids, first) if task_ids.ndim else task_ids
            begins = block_of(sources.first, first)
            packing = Packing(begins, jnp.zeros_like(begins))  # there is no dropout
            return cast(ReadSource, self._apply("read", self.layers, *texts, tasks, packing))

        def next_block(block: Array, read: ReadSource) -> ReadSource:
            first = jnp.minimum(block * size, rows - size)
            put = lambda old, x: lax.dynamic_update_slice_in_dim(old, x, first, 0)  # noqa: E731
            return jax.tree.map(put, read, read_block(first))

        empty = _zeros(jax.eval_shape(read_block, jnp.zeros((), jnp.int32)), rows)
        return lax.fori_loop(0, (sources.rows + size - 1) // size, next_block, empty)

    def _first_state(self, read: ReadSource) -> _State:
        """The state in which no slot has a source yet."""
        zero, pad = jnp.zeros((), jnp.int32), self.config.pad_token_id
        texts = Texts(
            jnp.full((self.none, self.room), pad, jnp.int32),
            jnp.zeros(self.none),
            jnp.zeros(self.none, bool),
        )
        state = _State(
            place=zero,
            search=self._begin(jnp.full(self.slots, pad, jnp.int32)),
            beam_at=jnp.zeros((self.slots, self.config.num_beams, self.room), jnp.int32),
            source=jnp.full(self.slots, self.none, jnp.int32),
            read=_zeros(read, self.slots),
            entries=None,
            left=None,
            dealt=zero,
            texts=texts,
        )
        beams = self.config.num_beams
        _, left = jax.eval_shape(self._decode, state)
        return state._replace(
            entries=kv_cache.empty(left, self.room * beams), left=kv_cache.empty(left, beams)
        )

    def _begin(self, start: Array) -> Search:
        """New searches, leaves [S, ...], in texts that begin with the tokens `start`, [S]."""
        return jax.vmap(lambda token: Search.begin(token, self.room, self.config))(start)

    def _step(self, state: _State) -> _State:
        """Continues every search by a token."""

        def search_on(search: Search, logits: Array) -> tuple[Search, Array]:
            of_next = constrain(logits, search.tokens, search.length, self.config)
            return advance(search, *of_next, self.config)

        beams = self.config.num_beams
        # Before the attentions read the cache, or XLA would copy it.
        before = (state.place - 1) % self.room * beams
        state = state._replace(entries=kv_cache.write(state.entries, state.left, before))
        hidden, left = self._decode(state)
        logits = self._apply("next_logits", hidden, self.words)
        search, parents = jax.vmap(search_on)(state.search, logits)
        here = (jnp.arange(self.room) == state.place)[None, None]
        beam_at = jnp.where(here, jnp.arange(beams)[None, :, None], state.beam_at)
        return state._replace(
            place=(state.place + 1) % self.room,
            search=search,
            beam_at=jnp.take_along_axis(beam_at, parents[..., None], axis=1),
            left=left,
        )

    def _decode(self, state: _State) -> tuple[Array, Any]:
        """The last hidden states of the live texts, [S, K, D], and what belongs into the cache."""
        beams = self.config.num_beams
        position = state.search.length - 1
        age = (state.place - jnp.arange(self.room)) % self.room  # of what is there in the ring
        is_seen = ((age[None] > 0) & (age[None] <= position[:, None]))[:, None, :, None]
        is_own = state.beam_at[..., None] == jnp.arange(beams)[None, None, None]
        return cast(
            tuple[Array, Any],
            self._apply(
                "step",
                self.layers,
                _at(state.search.tokens, position),
                position,
                (is_seen & is_own).reshape(self.slots, beams, self.room * beams),
                state.read,
                state.entries,
                self.sources.tasks(jnp.minimum(state.source, self.none - 1)),
            ),
        )

    def _collect(self, state: _State) -> _State:
        """Takes the texts of the searches that have come to an end, and frees their slots."""
        search = state.search
        is_over = search.done | (search.length == self.room)
        at = jnp.where(is_over, state.source, self.none)  # what is not there is dropped
        found = Texts(search.ended[:, 0], search.ended_scores[:, 0], search.done)
        put = lambda old, x: old.at[at].set(x, mode="drop")  # noqa: E731
        new = self._begin(jnp.full(self.slots, self.config.pad_token_id, jnp.int32))
        return state._replace(
            search=jax.tree.map(lambda old, x: jnp.where(_like(is_over, x), x, old), search, new),
            texts=jax.tree.map(put, state.texts, found),
            source=jnp.where(is_over, self.none, state.source),
        )

    def _deal(self, state: _State, read: ReadSource) -> _State:
        """Gives the free slots the next sources, as far as there are any."""

        class Slots(NamedTuple):  # what changes; the cache in the loop would be copied
            search: Search
            read: ReadSource
            source: Array
            dealt: Array

        def is_free(slots: Slots) -> Array:
            return (slots.dealt < self.sources.present) & (slots.source == self.none).any()

        def fill(slots: Slots) -> Slots:
            slot, source = jnp.argmax(slots.source == self.none), slots.dealt
            search = Search.begin(self.sources.start[source], self.room, self.config)
            row = jax.tree.map(lambda x: x[self.sources.row[source]], read)
            is_own = row.segment_ids == self.sources.segment[source]
            own = row._replace(segment_ids=is_own.astype(row.segment_ids.dtype))
            put = lambda old, x: lax.dynamic_update_index_in_dim(old, x, slot, 0)  # noqa: E731
            return Slots(
                search=jax.tree.map(put, slots.search, search),
                read=jax.tree.map(put, slots.read, own),
                source=put(slots.source, source),
                dealt=source + 1,
            )

        slots = Slots(state.search, state.read, state.source, state.dealt)
        return state._replace(**lax.while_loop(is_free, fill, slots)._asdict())


def _at(tokens: Array, position: Array) -> Array:
    """[S, K, L], [S] -> [S, K]: the token at each slot's position."""
    index = jnp.broadcast_to(position[:, None, None], (*tokens.shape[:2], 1))
    return jnp.take_along_axis(tokens, index, axis=2)[..., 0]


def _like(chosen: Array, x: Array) -> Array:
    """[S] -> [S, 1, ...], to choose among rows of x, [S, ...]."""
    return chosen.reshape(-1, *[1] * (x.ndim - 1))


def _zeros(shapes: Any, rows: int) -> Any:
    """Zeros of these shapes, with `rows` rows."""
    return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), shapes)
