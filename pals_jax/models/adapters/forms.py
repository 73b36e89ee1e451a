"""The forms of an adapter: small functions of a hidden state, with parameters that a task owns.

A form declares its parameters at one place of the encoder and computes a delta from them, which
`pals_jax.models.adapters.spec` composes with the state. It knows neither the encoder nor the task:
all rows that reach it belong to one task, whose `params` are already selected.

Dimension letters: see `pals_jax.models.layers`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.models.attention import dot_product_attention, merge_heads, split_heads
from pals_jax.models.dropout import dropout
from pals_jax.models.layers import ACTIVATIONS, layer_norm
from pals_jax.models.segments import Segments
from pals_jax.models.transformer import StackConfig
from pals_jax.runtime.errors import UserError

Params = Mapping[str, Any]
Initializer = Callable[..., Array]

_zeros, _ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
BERT_INIT = jax.nn.initializers.normal(0.02)  # "new weights N(0, .02), biases 0"


class Param(NamedTuple):
    """Shape of one parameter for one task at one place, and its initialiser.

    The initialiser is called once for all tasks and layers, which are leading axes of its shape.
    """

    shape: tuple[int, ...]
    init: Initializer = BERT_INIT


@dataclasses.dataclass(frozen=True)
class Context:
    """What a form may know of its surroundings.

    Attributes:
        config: the architecture of the stack of layers.
        segments: which example each position of a row belongs to.
        dropout_key: key of the form's dropout masks in this step; None turns dropout off.
        query: the queries [B, H, L, K], at the site "attention.heads" only.
        log_normaliser: the log of each softmax's denominator, [B, H, L], at the same site.
        to_query: the projection of states [B, L, D] to queries, at the same site.
    """

    config: StackConfig
    segments: Segments
    dropout_key: Array | None = None
    query: Array | None = None
    log_normaliser: Array | None = None
    to_query: Callable[[Array], Array] | None = None


class Form(Protocol):
    """A function of a hidden state with parameters of its own."""

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        """A tree of `Param`, for an input of `inputs` features and a state of `outputs`."""

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        """x: [B, L, inputs] -> [B, L, outputs], or what broadcasts to it, in the dtype of `x`."""


def dense(
    inputs: int, outputs: int, init: Initializer = BERT_INIT, bias: bool = True
) -> dict[str, Param]:
    """The parameters of one projection."""
    kernel = {"kernel": Param((inputs, outputs), init)}
    return kernel | ({"bias": Param((outputs,), _zeros)} if bias else {})


def project(params: Params, x: Array) -> Array:
    """x W + b, in the dtype of `x`; b may be absent."""
    y = x @ params["kernel"].astype(x.dtype)
    if "bias" not in params:
        return y
    return y + params["bias"].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def _normalised(params: Params, x: Array) -> Array:
    """The layer norm of an adapter, [..., D] -> [..., D], with PyTorch's epsilon."""
    return layer_norm(x, params["scale"], params["bias"], 1e-5, x.dtype)


def _norm(width: int) -> dict[str, Param]:
    """The parameters of one layer norm."""
    return {"scale": Param((width,), _ones), "bias": Param((width,), _zeros)}


# Kaiming-uniform with a = sqrt(5), as PyTorch initialises a projection [inputs, outputs].
def _kaiming_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _truncated_normal(deviation: float) -> Initializer:
    """Normal, truncated at two standard deviations (Houlsby et al., section 2.1)."""
    return jax.nn.initializers.truncated_normal(deviation, lower=-2.0, upper=2.0)


# Initialisers of a bottleneck's down and up projections.
INITS: Mapping[str, tuple[Initializer, Initializer]] = {
    "bert": (BERT_INIT, BERT_INIT),
    # The delta is zero at first (LoRA; He et al., scaled parallel adapter).
    "lora": (_kaiming_uniform, _zeros),
    # Nearly the identity (Houlsby et al., code; 1e-2 in their paper).
    "near_identity": (_truncated_normal(1e-3),) * 2,
}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """W_up act(W_down x): with activation "identity" a low-rank layer (V_D V_E h).

    Attributes:
        size: of the bottleneck.
        activation: between the projections.
        init: a key of `INITS`, or the standard deviation of a truncated normal.
        bias: whether the projections have biases.
        norm: whether a layer norm of the task's own comes first (He et al., code).
        dropout: of the input.
        out_norm: a factor s, with which the result is LN(s W_up act(W_down x)), by a layer norm of
            the task's own (He et al., code). None: there is no such layer norm.
    """

    size: int
    activation: str = "identity"
    init: str | float = "bert"
    bias: bool = True
    norm: bool = False
    dropout: float = 0.0
    out_norm: float | None = None

    def __post_init__(self) -> None:
        check_size(self.size)
        _check_known("activation", self.activation, ACTIVATIONS)
        if not (isinstance(self.init, float) and self.init > 0.0):
            _check_known("init", self.init, INITS)
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"an adapter's dropout is a share from 0 to 1, not {self.dropout!r}.")

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        init = self.init
        down, up = INITS[init] if isinstance(init, str) else (_truncated_normal(init),) * 2
        norms = {"norm": _norm(inputs)} if self.norm else {}
        norms |= {"out_norm": _norm(outputs)} if self.out_norm is not None else {}
        return norms | {
            "down": dense(inputs, self.size, down, self.bias),
            "up": dense(self.size, outputs, up, self.bias),
        }

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        x = _normalised(params["norm"], x) if self.norm else x
        x = dropout(x, self.dropout, context.dropout_key, context.segments.places)
        y = project(params["up"], ACTIVATIONS[self.activation](project(params["down"], x)))
        return y if self.out_norm is None else _normalised(params["out_norm"], self.out_norm * y)


@dataclasses.dataclass(frozen=True)
class ProjectedAttention:
    """V_D MH(V_E h): multi-head attention in a small space (Stickland & Murray, section 3.3).

    Its attention has no output projection, and an activation follows V_D, as in the authors' code.
    """

    size: int
    heads: int
    activation: str = "gelu"

    def __post_init__(self) -> None:
        check_size(self.size)
        _check_known("activation", self.activation, ACTIVATIONS)
        if type(self.heads) is not int or self.heads < 1 or self.size % self.heads:
            raise UserError(
                f"size {self.size} of the projected attention is not a multiple of its"
                f" {self.heads!r} heads; choose a size that is, or another number of heads."
            )

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        attention = {name: dense(self.size, self.size) for name in ("query", "key", "value")}
        return {"down": dense(inputs, self.size), **attention, "up": dense(self.size, outputs)}

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        z = project(params["down"], x)
        query, key, value = (
            split_heads(project(params[name], z), self.heads) for name in ("query", "key", "value")
        )
        heads, _ = dot_product_attention(
            query,
            key,
            value,
            context.segments,
            dropout_rate=context.config.attention_probs_dropout_prob,
            dropout_key=context.dropout_key,
        )
        return ACTIVATIONS[self.activation](project(params["up"], merge_heads(heads)))


@dataclasses.dataclass(frozen=True)
class ProjectedFeedForward:
    """V_D FFN(V_E h): one or two further projections (Stickland & Murray, section 3.3)."""

    size: int
    depth: int = 1
    activation: str = "gelu"

    def __post_init__(self) -> None:
        check_size(self.size)
        _check_known("activation", self.activation, ACTIVATIONS)
        if self.depth not in (1, 2):
            raise UserError(f"the projected feed-forward layers are 1 or 2, not {self.depth!r}.")

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        between = {f"ffn_{i}": dense(self.size, self.size) for i in range(self.depth)}
        return {"down": dense(inputs, self.size), **between, "up": dense(self.size, outputs)}

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        del context
        z = ACTIVATIONS[self.activation](project(params["ffn_0"], project(params["down"], x)))
        if self.depth == 2:
            z = project(params["ffn_1"], z)
        return project(params["up"], z)


@dataclasses.dataclass(frozen=True)
class Scale:
    """One factor for each feature of the state: l (IA3), or 2 sigmoid(w) (LHUC); 1 at first.

    Weight decay pulls w to 0, where the factor is 1. It would pull l to 0 as well, so l is named
    "scale" and exempt from decay, as the scales of layer norms are.
    """

    sigmoid: bool = False

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        del inputs
        return {
            "weight" if self.sigmoid else "scale": Param(
                (outputs,), _zeros if self.sigmoid else _ones
            )
        }

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        scale = 2.0 * jax.nn.sigmoid(params["weight"]) if self.sigmoid else params["scale"]
        return scale.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Attention of the encoder's own heads to P learned keys and values (He et al., table 1).

    Attributes:
        length: P, often written l.
        bottleneck: width of the network that re-parameterises keys and values (section 2.2); its
            embedding and first projection may be shared by layers. 0 learns them directly.
        activation: "softmax"; or "relu", which makes it the multi-head parallel adapter.
        norm: whether it has queries of its own, the projection of LN(x) with a layer norm of the
            task's own, in place of those of x (He et al., code).
        scaled: whether scores are divided by the square root of the heads' size.
    """

    length: int
    bottleneck: int = 0
    activation: str = "softmax"
    norm: bool = False
    scaled: bool = True

    def __post_init__(self) -> None:
        check_size(self.length)
        check_size(self.bottleneck, least=0)
        _check_known("activation", self.activation, ("softmax", "relu"))

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        norm = {"norm": _norm(inputs)} if self.norm else {}
        if not self.bottleneck:
            return norm | {name: Param((self.length, outputs)) for name in ("key", "value")}
        return norm | {
            "embedding": Param((self.length, inputs)),
            "down": dense(inputs, self.bottleneck),
            "up": dense(self.bottleneck, 2 * outputs),  # keys, then values
        }

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        scores, value = self._scores(params, x, context)
        softmax = self.activation == "softmax"
        weights = jax.nn.softmax(scores, axis=-1) if softmax else jax.nn.relu(scores)
        rate = context.config.attention_probs_dropout_prob
        places = context.segments.places
        weights = dropout(weights.astype(x.dtype), rate, context.dropout_key, places)
        return merge_heads(jnp.einsum("bhqp,bhpk->bhqk", weights, value))

    def gate(self, params: Params, x: Array, context: Context) -> Array:
        """lambda(x) of He et al., equation 8: the prefix's share of a joint softmax, [B, L, D]."""
        scores, value = self._scores(params, x, context)
        assert context.log_normaliser is not None  # which comes with the queries
        share = jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=-1) - context.log_normaliser)
        share = jnp.broadcast_to(share[..., None], (*share.shape, value.shape[-1]))
        return merge_heads(share).astype(x.dtype)

    def _scores(self, params: Params, x: Array, context: Context) -> tuple[Array, Array]:
        """Scores float32 [B, H, L, P], and values [1, H, P, K]."""
        query, to_query = context.query, context.to_query
        if query is None or to_query is None:
            raise UserError("a prefix works at the site attention.heads only.")
        if self.norm:
            query = to_query(_normalised(params["norm"], x))
        if self.bottleneck:
            z = jnp.tanh(project(params["down"], params["embedding"].astype(x.dtype)))
            key, value = jnp.split(project(params["up"], z), 2, axis=-1)
        else:
            key, value = (params[name].astype(x.dtype) for name in ("key", "value"))
        key, value = (split_heads(t[None], query.shape[1]) for t in (key, value))
        scores = jnp.einsum("bhqk,ghpk->bhqp", query, key, preferred_element_type=jnp.float32)
        scale = jnp.sqrt(jnp.float32(query.shape[-1])) if self.scaled else 1.0
        return scores / scale, value


@dataclasses.dataclass(frozen=True)
class Prompt:
    """P learned positions beside those of each text (prompt tuning, Lester et al. 2021).

    They are added after the embeddings' layer norm; texts attend to them, and the pooler never
    reads them.
    """

    length: int

    def __post_init__(self) -> None:
        check_size(self.length)

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        del inputs
        return {"embedding": Param((self.length, outputs))}

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        examples = context.segments.first.shape[1]  # each example of a row sees its own prompt
        prompt = jnp.repeat(params["embedding"].astype(x.dtype), examples, axis=0)[None]
        return jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Dense:
    """act(W x + b): a linear layer and a non-linearity."""

    activation: str

    def __post_init__(self) -> None:
        _check_known("activation", self.activation, ACTIVATIONS)

    def parameters(self, inputs: int, outputs: int, config: StackConfig) -> Mapping[str, Any]:
        return {"dense": dense(inputs, outputs)}

    def __call__(self, params: Params, x: Array, context: Context) -> Array:
        del context
        return ACTIVATIONS[self.activation](project(params["dense"], x))


def check_size(size: int, least: int = 1) -> None:
    """Refuses what is no whole number from `least`."""
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
        raise UserError(f"an adapter's size must be a whole number from {least}, not {size!r}.")


def _check_known(what: str, name: object, known: Any) -> None:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"unknown {what} {name!r}; known are {', '.join(known)}.")
