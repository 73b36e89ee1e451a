"""The methods, as values in the design space: each is a function that returns its adapters.

Methods are added with +: `houlsby(size=64) + pooler()`.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from pals_jax.models.adapters.blocks import Blocks
from pals_jax.models.adapters.forms import (
    Bottleneck,
    Dense,
    Form,
    Prefix,
    ProjectedAttention,
    Prompt,
    Scale,
)
from pals_jax.models.adapters.pals import V_D, V_E, low_rank, pals, projected_ffn
from pals_jax.models.adapters.pooling import mean_pooling
from pals_jax.models.adapters.spec import Adapter, Layers, Method, TaskCopy
from pals_jax.runtime.errors import UserError

# ------------------------------------------------ BERT and PALs (Stickland & Murray 2019)


def shared() -> Method:
    """Nothing but the heads: one encoder shared by all tasks."""
    return ()


def lhuc(layers: Layers = "all") -> Method:
    """Learning hidden unit contributions: each layer's output times 2 sigmoid(w)."""
    return (
        Adapter("lhuc", "layer.output", Scale(sigmoid=True), layers=layers, compose="multiply"),
    )


def bert_n_pals_houlsby(size: int = 50) -> Method:
    """Houlsby-style adapters as the code of BERT and PALs has them.

    The one behind attention is serial, the other reads the feed-forward block's input.
    """
    return (
        Adapter("attention_adapter", "attention.output", Bottleneck(size, "gelu"), reads="state"),
        Adapter("ffn_adapter", "ffn.output", Bottleneck(size, "gelu")),
    )


def houlsby_plus_pals(size: int = 156, attention_size: int = 50, heads: int = 6) -> Method:
    """`bert_n_pals_houlsby` with a PAL of `size` in parallel with the feed-forward block."""
    attention, _ = bert_n_pals_houlsby(attention_size)
    form = ProjectedAttention(size, heads)
    return (attention, Adapter("pal", "ffn.output", form, shared=(V_E, V_D)))


def top_attention(size: int = 204, blocks: int = 6, heads: int = 12) -> Method:
    """Complete attention blocks in a small space on top of the encoder (section 3.2)."""
    return _top(Blocks("attention", blocks, size, heads))


def top_ffn(size: int = 204, blocks: int = 6) -> Method:
    """Feed-forward blocks in a small space on top of the encoder (section 3.2)."""
    return _top(Blocks("ffn", blocks, size, heads=1))


def top_layer(count: int = 1) -> Method:
    """A complete BERT layer for each task on top of the encoder (section 3.2)."""
    return _top(Blocks("layer", count))


def top_dense(activation: str = "gelu") -> Method:
    """A linear layer and a non-linearity on top of the encoder (section 3.2)."""
    return _top(Dense(activation))


def _top(form: Form) -> Method:
    return (Adapter("top", "top", form, compose="replace"),)


def pooler() -> Method:
    """A pooler of each task's own."""
    return (TaskCopy("pooler", "pooler/"),)


# ------------------------------------------------ Houlsby et al. 2019


def houlsby(
    size: int = 64,
    activation: str = "gelu",
    norms: bool = True,
    layers: Layers = "all",
    init: str | float = "near_identity",
) -> Method:
    """Serial bottleneck adapters behind attention and feed-forward, nearly the identity at first.

    Args:
        size: m, the width of the bottleneck.
        activation: "gelu_new", the tanh approximation, in the authors' code.
        norms: whether each task owns its layer norms, so that tasks cannot touch each other.
        layers: the layers that carry them.
        init: "near_identity", or another standard deviation (their figure 6).
    """
    form = Bottleneck(size, activation, init)
    adapters = (
        Adapter("attention_adapter", "attention.output", form, "state", layers),
        Adapter("ffn_adapter", "ffn.output", form, "state", layers),
    )
    return adapters + (layer_norms() if norms else ())


def layer_norms() -> Method:
    """Every layer norm of each task's own (section 3.4)."""
    return (TaskCopy("layer_norms", ".*norm/"),)


def top_layers(count: int = 1) -> Method:
    """The top layers and the pooler of each task's own: fine-tuning only these (section 3.3)."""
    if type(count) is not int or count < 1:
        raise UserError(f"top_layers owns a whole number of layers from 1, not {count!r}.")
    layers = tuple(range(-count, 0))
    return (TaskCopy("top_layers", "layers/|pooler/", layers),)


# ------------------------------------------------ Towards a unified view (He et al. 2022)


def prefix_tuning(length: int = 16, bottleneck: int = 800, gated: bool = True) -> Method:
    """Prefix tuning: learned keys and values for the encoder's own heads.

    Args:
        length: l, the number of keys.
        bottleneck: width of their re-parameterisation; 0 learns them directly.
        gated: as a part of the heads' softmax; otherwise with its own, and added.
    """
    form = Prefix(length, bottleneck)
    shared = ("embedding", "down") if bottleneck else ()
    compose: Literal["gate", "add"] = "gate" if gated else "add"
    return (Adapter("prefix", "attention.heads", form, shared=shared, compose=compose),)


def prompt_tuning(length: int = 16) -> Method:
    """Learned positions beside the text's, in the input only (Lester et al. 2021)."""
    return (Adapter("prompt", "embeddings", Prompt(length), compose="concat"),)


# What of the encoder LoRA can change: name -> site. The input is that of the projection.
LORA_SITES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.projection",
    "ffn_in": "ffn.intermediate",
    "ffn_out": "ffn.projection",
}


def lora(
    rank: int = 8,
    alpha: float = 8.0,
    targets: tuple[str, ...] = ("query", "value"),
    dropout: float = 0.0,
) -> Method:
    """LoRA: a low-rank change alpha / r W_up W_down x of projections (Hu et al. 2021).

    Args:
        rank: r.
        alpha: the change is scaled by alpha / r.
        targets: any of query, key, value, output, ffn_in, ffn_out.
        dropout: of the projection's input.
    """
    if not isinstance(targets, tuple) or not targets or set(targets) - set(LORA_SITES):
        raise UserError(f"LoRA's targets are a list of {', '.join(LORA_SITES)}, not {targets!r}.")
    form = Bottleneck(rank, init="lora", bias=False, dropout=dropout)
    scale = alpha / rank
    return tuple(Adapter(f"lora_{name}", LORA_SITES[name], form, scale=scale) for name in targets)


def is_low_rank_change(spec: Adapter | TaskCopy) -> bool:
    """Whether a part of a method does nothing but change a projection by one of low rank."""
    match spec:
        case Adapter(
            form=Bottleneck(activation="identity", norm=False, out_norm=None),
            reads="block_input",
            compose="add",
        ):
            return spec.site in LORA_SITES.values()
    return False


def is_lora(spec: Adapter | TaskCopy) -> bool:
    """Whether it is LoRA: such a change without biases, its scale a number."""
    match spec:
        case Adapter(form=Bottleneck(bias=False), scale=int() | float()):
            return is_low_rank_change(spec)
    return False


def adapter(size: int = 64, activation: str = "relu") -> Method:
    """The sequential adapter at the feed-forward block, ReLU(h W_down) W_up."""
    return (Adapter("ffn_adapter", "ffn.output", Bottleneck(size, activation), reads="state"),)


def pfeiffer(size: int = 48, activation: str = "relu") -> Method:
    """One adapter for each layer, which reads behind the layer norm (Pfeiffer et al. 2021)."""
    return (Adapter("ffn_adapter", "ffn.output", Bottleneck(size, activation), reads="normalised"),)


# Where an adapter may run in parallel: with the whole feed-forward block, or with the heads,
# before their output projection (He et al., code).
_PARALLEL_SITES = {"ffn": "ffn.output", "attention": "attention.heads"}


def parallel(
    size: int = 64,
    site: str = "ffn",
    scale: float | Literal["learned"] = 1.0,
    activation: str = "relu",
    init: str = "bert",
) -> Method:
    """The parallel adapter, ReLU(x W_down) W_up of the input of a block.

    Args:
        size: r, the width of the bottleneck.
        site: "ffn" or "attention".
        scale: s, or "learned".
        activation: between the projections.
        init: "bert", or "lora" as the scaled one.
    """
    if site not in _PARALLEL_SITES:
        raise UserError(f"a parallel adapter's site is ffn or attention, not {site!r}.")
    form = Bottleneck(size, activation, init)
    return (Adapter(f"{site}_adapter", _PARALLEL_SITES[site], form, scale=scale),)


def scaled_parallel(size: int = 64, scale: float | Literal["learned"] = 4.0) -> Method:
    """The scaled parallel adapter at the feed-forward block, which begins at zero."""
    return parallel(size, "ffn", scale, init="lora")


def multi_head_parallel(size: int = 30) -> Method:
    """The multi-head parallel adapter: a prefix whose softmax is a ReLU, and which is added."""
    form = Prefix(size, activation="relu")
    return (Adapter("multi_head_adapter", "attention.heads", form),)


def mam(prefix: int = 16, size: int = 16, scale: float | Literal["learned"] = 2.0) -> Method:
    """Mix-and-match: a small prefix at attention, a large scaled parallel adapter at the rest.

    The prefix is stored flat, as it is after training (the paper counts it so).
    """
    return prefix_tuning(prefix, bottleneck=0) + scaled_parallel(size, scale)


def bitfit() -> Method:
    """Every bias of each task's own (Ben Zaken et al. 2022)."""
    return (TaskCopy("biases", ".*/bias$"),)


def ia3() -> Method:
    """Factors for keys, values and the activated expansion (Liu et al. 2022)."""
    sites = {"key": "attention.key", "value": "attention.value", "ffn": "ffn.hidden"}
    return tuple(
        Adapter(f"ia3_{name}", site, Scale(), compose="multiply") for name, site in sites.items()
    )


METHODS: Mapping[str, Callable[..., Method]] = {
    method.__name__: method
    for method in (
        *(shared, pals, low_rank, projected_ffn, lhuc, bert_n_pals_houlsby, houlsby_plus_pals),
        *(top_attention, top_ffn, top_layer, top_dense, pooler),
        mean_pooling,
        *(houlsby, layer_norms, top_layers),
        *(prefix_tuning, prompt_tuning, lora, adapter, pfeiffer, parallel, scaled_parallel),
        *(multi_head_parallel, mam, bitfit, ia3),
    )
}
