"""Generation on the device: the encoder once per source, then a loop of steps of the decoder.

The loop works on a few slots, each with the search for one source. When a search is done, the next
source takes its slot, so that short texts do not wait for long ones. Positions therefore differ
between slots, but all slots write to the same place of the key-value cache, which is a ring. Nor do
beams move in it: a live text knows in which beam each of its positions was computed.

Dimension letters: see `pals_jax.models.layers`; S slots, N sources, K beams, L tokens of a text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from pals_jax.inference.generation.config import GenerationConfig
from pals_jax.inference.generation.constraints import constrain
from pals_jax.inference.generation.search import Search, advance, candidates
from pals_jax.models.seq2seq import ReadSource, Seq2SeqModel
from pals_jax.models.stack import unstacked


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
        beam_at: int [S, K, L]; the beam in which the position of a live text was computed that is
            at each place of the ring.
        source: int [S]; the source of each slot, N if it has none.
        read: leaves [S, ...]; what the steps need of it.
        entries: leaves [S, ...]; of the cache.
        dealt: int scalar; how many sources have had a slot.
        texts: the texts so far.
    """

    place: Array
    search: Search
    beam_at: Array
    source: Array
    read: ReadSource
    entries: Any
    dealt: Array
    texts: Texts


def make_generate(
    model: Seq2SeqModel, config: GenerationConfig, slots: int, room: int
) -> Callable[..., Texts]:
    """The pure function from variables and sources to their texts.

    Its arguments are the variables; `input_ids` and `attention_mask`, int [N, J]; `start`, int [N],
    the token that each text begins with; `count`, an int scalar, how many of the N sources there
    are; and `task_ids`, int, a scalar or [N].

    Args:
        model: the model.
        config: the settings of the search.
        slots: S, the number of sources in a step; it divides N.
        room: L, the most tokens of a text.
    """
    beams = config.num_beams

    def generate(
        variables: optax.Params,
        input_ids: Array,
        attention_mask: Array,
        start: Array,
        count: Array,
        task_ids: Array,
    ) -> Texts:
        sources = len(input_ids)
        layers = unstacked(variables["params"]["decoder"]["layers"])
        begin = jax.vmap(lambda token: Search.begin(token, room, config))

        def tasks_of(source: Array) -> Array:
            return task_ids if task_ids.ndim == 0 else task_ids[source]

        def apply(method: str, *inputs: Any) -> Any:
            return model.apply(variables, *inputs, method=method)

        def read_block(first: Array) -> ReadSource:
            texts = (lax.dynamic_slice_in_dim(x, first, slots) for x in (input_ids, attention_mask))
            rows = first + jnp.arange(slots)
            return cast(ReadSource, apply("read", layers, *texts, tasks_of(rows)))

        def decode(state: _State) -> tuple[Array, Any]:
            """The last hidden states of the live texts, [S, K, D], and the cache."""
            position = state.search.length - 1
            age = (state.place - jnp.arange(room)) % room  # of the places of the ring
            own = state.beam_at[..., None] == jnp.arange(beams)[None, None, None]
            visible = (age[None] <= position[:, None])[:, None, :, None] & own
            return cast(
                tuple[Array, Any],
                apply(
                    "step",
                    layers,
                    _at(state.search.tokens, position),
                    position,
                    visible.reshape(slots, beams, room * beams),
                    state.place * beams,
                    state.read,
                    state.entries,
                    tasks_of(jnp.minimum(state.source, sources - 1)),
                ),
            )

        def search_on(search: Search, logits: Array) -> tuple[Search, Array]:
            constrained = constrain(logits, search.tokens, search.length, config)
            return advance(search, *candidates(logits, constrained, config), config)

        def step(state: _State) -> _State:
            here = jnp.arange(room)[None, None] == state.place
            state = state._replace(
                beam_at=jnp.where(here, jnp.arange(beams)[None, :, None], state.beam_at)
            )
            hidden, entries = decode(state)
            search, parents = jax.vmap(search_on)(state.search, apply("logits", hidden))
            beam_at = jnp.take_along_axis(state.beam_at, parents[..., None], axis=1)
            place = (state.place + 1) % room
            return deal(
                collect(
                    state._replace(place=place, search=search, beam_at=beam_at, entries=entries)
                )
            )

        def collect(state: _State) -> _State:
            """Takes the texts of the searches that have come to an end, and frees their slots."""
            search = state.search
            full = search.done | (search.length == room)
            at = jnp.where(full, state.source, sources)  # else none, which is dropped
            found = Texts(search.ended[:, 0], search.ended_scores[:, 0], search.done)
            texts = jax.tree.map(
                lambda all_texts, x: all_texts.at[at].set(x, mode="drop"), state.texts, found
            )
            new = begin(jnp.zeros(slots, jnp.int32))
            search = jax.tree.map(lambda old, x: jnp.where(_like(full, x), x, old), search, new)
            return state._replace(
                search=search, texts=texts, source=jnp.where(full, sources, state.source)
            )

        def deal(state: _State) -> _State:
            """Gives the free slots the next sources, as far as there are any."""

            def is_free(state: _State) -> Array:
                return (state.dealt < count) & (state.source == sources).any()

            def fill(state: _State) -> _State:
                slot = jnp.argmax(state.source == sources)
                new = begin(start[state.dealt][None]), jax.tree.map(lambda x: x[state.dealt], read)
                put = lambda old, x: lax.dynamic_update_index_in_dim(old, x, slot, 0)  # noqa: E731
                return state._replace(
                    search=jax.tree.map(put, state.search, new[0]),
                    read=jax.tree.map(put, state.read, new[1]),
                    source=put(state.source, state.dealt),
                    dealt=state.dealt + 1,
                )

            return lax.while_loop(is_free, fill, state)

        def read_all() -> ReadSource:
            def next_block(block: Array, read: ReadSource) -> ReadSource:
                first = block * slots
                put = lambda old, x: lax.dynamic_update_slice_in_dim(old, x, first, 0)  # noqa: E731
                return jax.tree.map(put, read, read_block(first))

            empty = _zeros(jax.eval_shape(read_block, jnp.zeros((), jnp.int32)), sources)
            return lax.fori_loop(0, (count + slots - 1) // slots, next_block, empty)

        read = read_all()
        nothing = Texts(
            jnp.full((sources, room), config.pad_token_id, jnp.int32),
            jnp.zeros(sources),
            jnp.zeros(sources, bool),
        )
        zero = jnp.zeros((), jnp.int32)
        state = _State(
            place=zero,
            search=begin(jnp.zeros(slots, jnp.int32)),
            beam_at=jnp.zeros((slots, beams, room), jnp.int32),
            source=jnp.full(slots, sources),
            read=jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), read),
            entries=None,
            dealt=zero,
            texts=nothing,
        )
        state = state._replace(entries=_zeros(jax.eval_shape(decode, state)[1], slots))
        return lax.while_loop(lambda state: (state.source < sources).any(), step, deal(state)).texts

    return generate


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
