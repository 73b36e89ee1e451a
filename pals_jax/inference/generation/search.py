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


def candidates(logits: Array, constrained: Array, config: GenerationConfig) -> tuple[Array, Array]:
    """The 2K best next tokens of each live text.

    Args:
        logits: float32 [K, V].
        constrained: the same, with what is forbidden; see `constraints`.
        config: the settings.

    Returns:
        Their log p, float32 [K, 2K], and the tokens, int [K, 2K].
    """
    values, tokens = best(constrained, 2 * config.num_beams)
    of_all = constrained if config.renormalize_logits else logits
    return values - jax.nn.logsumexp(of_all, axis=-1, keepdims=True), tokens


def advance(
    search: Search, log_probs: Array, next_tokens: Array, config: GenerationConfig
) -> tuple[Search, Array]:
    """The search one token later.

    Args:
        search: the search so far.
        log_probs: float32 [K, 2K]; as `candidates` gives them.
        next_tokens: int [K, 2K].
        config: the settings.

    Returns:
        The search, and for each of its live texts which of the old ones it continues, int [K].
    """
    beams, length = config.num_beams, search.length
    totals, index = jax.lax.top_k((search.scores[:, None] + log_probs).reshape(-1), 2 * beams)
    parents, token = index // (2 * beams), next_tokens.reshape(-1)[index]
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
    """The `count` largest values along the last axis of x [..., V], and their indices.

    It is `jax.lax.top_k` for a long axis, several times as fast on CPUs: the largest values are in
    the blocks with the largest maxima.
    """
    size = x.shape[-1]
    blocks = size // _WIDTH
    if blocks <= count:
        return jax.lax.top_k(x, count)
    rest = x[..., blocks * _WIDTH :]
    maxima = x[..., : blocks * _WIDTH].reshape(*x.shape[:-1], blocks, _WIDTH).max(-1)
    _, chosen = jax.lax.top_k(maxima, count)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal values the first comes first
    index = (chosen[..., None] * _WIDTH + jnp.arange(_WIDTH)).reshape(*x.shape[:-1], -1)
    values = jnp.take_along_axis(x, index, axis=-1)
    values = jnp.concatenate([values, rest], axis=-1)
    tail = jnp.broadcast_to(jnp.arange(blocks * _WIDTH, size), rest.shape)
    values, place = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(jnp.concatenate([index, tail], axis=-1), place, axis=-1)
