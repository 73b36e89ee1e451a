"""Greedy and beam search for one source, as pure functions; `jax.vmap` extends them to many.

It is the search of transformers' `generate`: of the 2K best continuations of the K live texts,
those among the first K that end are kept with their scores, and the K best of the others live on.
Greedy search is that of one beam.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.inference.generation.config import GenerationConfig

NONE = -1e9  # the score of a text that is not there, as in transformers
_WIDTH = 128  # of the blocks in which `best` looks first


class Search(NamedTuple):
    """The search for one source.

    Attributes:
        tokens: int [K, L]; the live texts, which begin with the start token.
        scores: float32 [K]; log p of each.
        length: int scalar; how many tokens they have.
        ended: int [K, L]; the best texts that have ended, best first.
        ended_scores: float32 [K]; the score of each, or `NONE`.
        done: bool scalar; whether the first of them is the answer.
    """

    tokens: Array
    scores: Array
    length: Array
    ended: Array
    ended_scores: Array
    done: Array

    @classmethod
    def begin(cls, start: Array, room: int, config: GenerationConfig) -> "Search":
        """A search in texts of at most `room` tokens that begin with the token `start`."""
        beams = config.num_beams
        empty = jnp.full((beams, room), config.pad_token_id, jnp.int32)
        # Only the first beam is there, or all would become the same.
        scores = jnp.where(jnp.arange(beams) == 0, 0.0, NONE)
        none, length = jnp.full(beams, NONE), jnp.ones((), jnp.int32)
        return cls(empty.at[:, 0].set(start), scores, length, empty, none, jnp.zeros((), bool))


def advance(
    search: Search, logits: Array, log_sum: Array, config: GenerationConfig
) -> tuple[Search, Array]:
    """The search one token later.

    Args:
        search: the search so far.
        logits: float32 [K, V]; of the next token of each live text.
        log_sum: float32 [K, 1]; what they exceed log p by.
        config: the settings.

    Returns:
        The search, and for each of its live texts which of the old ones it continues, int [K].
    """
    beams, length = config.num_beams, search.length
    of_each, tokens = best(logits, 2 * beams)
    totals = search.scores[:, None] + (of_each - log_sum)
    totals, index = jax.lax.top_k(totals.reshape(-1), 2 * beams)
    parents, token = index // (2 * beams), tokens.reshape(-1)[index]
    texts = jnp.where(
        jnp.arange(search.tokens.shape[1])[None] == length,
        token[:, None],
        search.tokens[parents],
    )
    at_end = length + 1 == config.max_length
    ends = (token == config.eos_token_id) | at_end

    penalty = length.astype(jnp.float32) ** config.length_penalty
    kept = ends & (jnp.arange(2 * beams) < beams)
    scores = jnp.concatenate([search.ended_scores, jnp.where(kept, totals / penalty, NONE)])
    ended_scores, chosen = jax.lax.top_k(scores, beams)
    ended = jnp.concatenate([search.ended, texts])[chosen]

    live_scores, live = jax.lax.top_k(jnp.where(ends, NONE, totals), beams)
    worst = ended_scores[-1]
    if beams == 1 or config.early_stopping is True:
        is_enough = jnp.array(True)
    elif config.early_stopping == "original":
        is_enough = worst >= totals[0] / penalty
    else:
        is_enough = worst >= live_scores[0] / penalty
    done = at_end | ((worst > NONE) & is_enough)
    after = Search(texts[live], live_scores, length + 1, ended, ended_scores, done)
    return after, parents[live]


def best(x: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest values in each row of x [K, V], and their indices, both [K, count].

    It is `jax.lax.top_k` for long rows, several times as fast on CPUs: the largest values are in
    the blocks with the largest maxima.
    """
    rows, size = x.shape
    blocks = size // _WIDTH
    if blocks <= count:
        values, index = jax.lax.top_k(x, count)
        return values, index
    whole = blocks * _WIDTH
    maxima = x[:, :whole].reshape(rows, blocks, _WIDTH).max(-1)
    _, chosen = jax.lax.top_k(maxima, count)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal values the first comes first
    index = (chosen[..., None] * _WIDTH + jnp.arange(_WIDTH)[None, None]).reshape(rows, -1)
    rest = jnp.broadcast_to(jnp.arange(whole, size), (rows, size - whole))
    index = jnp.concatenate([index, rest], axis=1)
    values, place = jax.lax.top_k(jnp.take_along_axis(x, index, axis=1), count)
    return values, jnp.take_along_axis(index, place, axis=1)
