"""What a text may not contain: constraints on the logits of its next token.

Functions of one source's K live texts; `jax.vmap` extends them to many. In the order of
transformers, whose results they give.
"""

import jax.numpy as jnp
from jax import Array

from pals_jax.inference.generation.config import GenerationConfig

FORBIDDEN = -jnp.inf


def constrain(logits: Array, tokens: Array, length: Array, config: GenerationConfig) -> Array:
    """The logits [K, V] of the next tokens, with `FORBIDDEN` at those that are not allowed.

    Args:
        logits: float32 [K, V].
        tokens: int [K, L]; the texts so far.
        length: int scalar; how many tokens they have.
        config: the settings.
    """
    token = jnp.arange(logits.shape[1])[None]
    if config.no_repeat_ngram_size:
        logits = _forbid_repeated(logits, tokens, length, config.no_repeat_ngram_size)
    for suppressed in config.suppress_tokens:
        logits = jnp.where(token == suppressed, FORBIDDEN, logits)
    if config.min_length:
        too_short = length < config.min_length
        logits = jnp.where(too_short & (token == config.eos_token_id), FORBIDDEN, logits)
    for forced, when in (
        (config.forced_bos_token_id, 1),
        (config.forced_eos_token_id, config.max_length - 1),
    ):
        if forced is not None:
            only = jnp.where(token == forced, 0.0, FORBIDDEN)
            logits = jnp.where(length == when, only, logits)
    return logits


def _forbid_repeated(logits: Array, tokens: Array, length: Array, size: int) -> Array:
    """Forbids the tokens that would complete the same `size` tokens once more."""
    beams, room = tokens.shape
    start = jnp.arange(max(room - size + 1, 0))  # of the groups of `size` tokens
    groups = tokens[:, start[:, None] + jnp.arange(size)]  # [K, starts, size]
    last = jnp.take_along_axis(
        tokens, jnp.maximum(length - size + 1 + jnp.arange(size - 1), 0)[None], axis=1
    )
    same = (groups[..., :-1] == last[:, None]).all(-1) & (start + size <= length)[None]
    repeated = jnp.where(same, groups[..., -1], logits.shape[1])  # else none, which is dropped
    return logits.at[jnp.arange(beams)[:, None], repeated].set(FORBIDDEN, mode="drop")
