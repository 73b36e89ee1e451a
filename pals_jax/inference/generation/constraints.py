"""What a text may not contain: constraints on the logits of its next token.

Functions of one source's K live texts; `jax.vmap` extends them to many. In the order of
transformers, whose results they give.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.inference.generation.config import GenerationConfig

FORBIDDEN = -jnp.inf


def constrain(
    logits: Array, tokens: Array, length: Array, config: GenerationConfig
) -> tuple[Array, Array]:
    """The logits of the next tokens, and the logarithm of the sum of their exponentials.

    Args:
        logits: float32 [K, V].
        tokens: int [K, L]; the texts so far.
        length: int scalar; how many tokens they have.
        config: the settings.

    Returns:
        float32 [K, V], `FORBIDDEN` at tokens that are not allowed, and float32 [K, 1]. The
        difference is log p, and is 0 for a token that is forced.
    """
    if config.renormalize_logits:
        logits = _constrain(logits, tokens, length, config, jnp.zeros((1, 1)))
        return logits, _log_sum(logits)
    log_sum = _log_sum(logits)
    return _constrain(logits, tokens, length, config, log_sum), log_sum


def _log_sum(logits: Array) -> Array:
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _constrain(
    x: Array, tokens: Array, length: Array, config: GenerationConfig, forced_logit: Array
) -> Array:
    token = jnp.arange(x.shape[1])[None]
    if config.no_repeat_ngram_size:
        x = _forbid_repeated(x, tokens, length, config.no_repeat_ngram_size)
    for suppressed in config.suppress_tokens:
        x = jnp.where(token == suppressed, FORBIDDEN, x)
    if config.min_length:
        too_short = length < config.min_length
        x = jnp.where(too_short & (token == config.eos_token_id), FORBIDDEN, x)
    for forced, when in (
        (config.forced_bos_token_id, 1),
        (config.forced_eos_token_id, config.max_length - 1),
    ):
        if forced is not None:
            only = jnp.where(token == forced, forced_logit, FORBIDDEN)
            x = jnp.where(length == when, only, x)
    return x


def _forbid_repeated(x: Array, tokens: Array, length: Array, size: int) -> Array:
    """Forbids the tokens that would complete the same `size` tokens once more."""
    beams, room = tokens.shape
    start = jnp.arange(max(room - size + 1, 0))  # of the groups of `size` tokens
    groups = tokens[:, start[:, None] + jnp.arange(size)[None]]  # [K, starts, size]
    last = jnp.take_along_axis(
        tokens, jnp.maximum(length - size + 1 + jnp.arange(size - 1), 0)[None], axis=1
    )
    same = (groups[..., :-1] == last[:, None]).all(-1) & (start + size <= length)[None]
    repeated = jnp.where(same, groups[..., -1], x.shape[1])  # else none, which is dropped
    return x.at[jnp.arange(beams)[:, None], repeated].set(FORBIDDEN, mode="drop")
