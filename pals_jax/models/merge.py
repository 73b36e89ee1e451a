"""Adapters that are a change of the model's own weights, written into these weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Prefix, Scale
from pals_jax.models.adapters.places import Place, places
from pals_jax.models.adapters.spec import BLOCKS, Adapter, Method, TaskCopy
from pals_jax.models.architectures import num_tasks
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.task_rows import check_task_ids

_Path = tuple[str, ...]
AnyModel = TypeVar("AnyModel", MultiTaskModel, Seq2SeqModel)

# Of each site that a projection's output or input is, the projection.
_OUTPUTS: Mapping[str, _Path] = {
    "attention.query": ("layers", "attention", "query"),
    "attention.key": ("layers", "attention", "key"),
    "attention.value": ("layers", "attention", "value"),
    "attention.projection": ("layers", "attention", "output"),
    "ffn.intermediate": ("layers", "ffn", "intermediate"),
    "ffn.projection": ("layers", "ffn", "output"),
}
_INPUTS: Mapping[str, _Path] = {
    "attention.heads": ("layers", "attention", "output"),
    "ffn.hidden": ("layers", "ffn", "output"),
}
_PROJECTIONS = {**_OUTPUTS, **_INPUTS}


def merged(
    model: AnyModel, variables: Mapping[str, Any], task: int
) -> tuple[AnyModel, dict[str, Any]]:
    """The model of one task alone, with what belongs to it merged into the shared parameters.

    Merged is what is exact without dropout: a low-rank change of a projection without activation
    (LoRA: W + s W_down W_up), factors of a projection's output or input (IA3), and copies of the
    encoder's parameters, which take their place. All else stays in the method as it is.

    Args:
        model: the model of T tasks.
        variables: its variables.
        task: the index of the task.

    Returns:
        The model with T = 1 and what is left of the method, and its variables, float32.

    Raises:
        UserError: there is no such task.
    """
    check_task_ids(num_tasks(model), task)
    rows = jax.tree.map(lambda x: np.array(x[task]), dict(variables["adapters"]))
    weights, rest = _split(model.method)
    params, left = dict(variables["params"]), dict[str, Any]()
    for block, config in model.config.stacks.items():
        stack = flatten_dict(jax.tree.map(np.array, dict(params[block])))
        _merge(stack, model.method, weights, block, config.num_hidden_layers, rows)
        params[block] = unflatten_dict(stack)
        left |= {place.name: rows[place.name] for place in places(rest, block)}
    if isinstance(model, MultiTaskModel):
        outputs = model.num_outputs[task]
        left["head"] = {name: leaf[..., :outputs] for name, leaf in rows["head"].items()}
        alone: Any = model.clone(num_outputs=(outputs,), method=rest)
    else:
        alone = model.clone(num_tasks=1, method=rest)
    return alone, {"params": params, "adapters": jax.tree.map(lambda x: x[None], left)}


def _merge(
    stack: dict[_Path, np.ndarray],
    method: Method,
    weights: Method,
    block: str,
    depth: int,
    rows: Mapping[str, Any],
) -> None:
    """Writes a task's copies and the changes `weights` into the parameters of one stack."""
    for place in places(method, block):
        if isinstance(place.part, TaskCopy):
            _own(stack, place.part, rows[place.name], depth)
    # Factors of a projection's input come last: they also change what is added to its kernel.
    for place in sorted(places(weights, block), key=lambda place: place.adapter.site in _INPUTS):
        params = {**rows[place.name].get("shared", {}), **rows[place.name].get("layers", {})}
        layers = list(place.part.layer_indices(depth))
        merge = _add if place.adapter.compose == "add" else _multiply
        merge(stack, place, params, layers)


def flat_method(method: Method) -> Method:
    """The method with flat prefixes: what is stored of it once it is trained."""
    flat: Method = ()
    for spec in method:
        if isinstance(spec, Adapter) and isinstance(spec.form, Prefix) and spec.form.bottleneck:
            form = dataclasses.replace(spec.form, bottleneck=0)
            flat += (dataclasses.replace(spec, form=form, shared=()),)
        else:
            flat += (spec,)
    return flat


def flat_prefixes(method: Method, adapters: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Prefixes as the keys and values that their networks give, which is all that is used of them.

    Args:
        method: the method.
        adapters: the `adapters` collection, leaves [T, ...].

    Returns:
        The method with flat prefixes, and the collection that goes with it.
    """
    collection = dict(adapters)
    for spec in method:
        if isinstance(spec, Adapter) and isinstance(spec.form, Prefix) and spec.form.bottleneck:
            names = [place.name for block in BLOCKS for place in places((spec,), block)]
            for name in set(names) & set(adapters):
                own = {"norm": adapters[name]["layers"]["norm"]} if spec.form.norm else {}
                collection[name] = {"layers": own | _keys_and_values(adapters[name])}
    return flat_method(method), collection


def _keys_and_values(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Keys and values [T, n, P, D] of a prefix with its network (see `forms.Prefix`)."""
    shared, up = params["shared"], params["layers"]["up"]
    down = shared["down"]
    z = np.tanh(shared["embedding"] @ down["kernel"] + down["bias"][:, None, :])
    y = np.einsum("tpm,tnmd->tnpd", z, up["kernel"]) + up["bias"][:, :, None, :]
    key, value = np.split(y, 2, axis=-1)
    return {"key": key, "value": value}


def _split(method: Method) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...]]:
    """The adapters that can be merged, and the rest.

    An adapter that cannot be merged also keeps others at its projection from being merged.
    """
    adapters = tuple(spec for spec in method if isinstance(spec, Adapter))
    reserved = {_PROJECTIONS.get(a.site) for a in adapters if not _is_weight_change(a)} - {None}
    weights = tuple(
        a for a in adapters if _is_weight_change(a) and _PROJECTIONS[a.site] not in reserved
    )
    return weights, tuple(a for a in adapters if a not in weights)


def _is_weight_change(adapter: Adapter) -> bool:
    if adapter.compose == "multiply":
        return adapter.form == Scale() and adapter.site in _PROJECTIONS
    return methods.is_low_rank_change(adapter)


def _own(encoder: dict[_Path, np.ndarray], task_copy: TaskCopy, mine: Any, depth: int) -> None:
    layers = list(task_copy.layer_indices(depth))
    for path, leaf in flatten_dict(mine).items():
        encoder[path][layers if path[0] == "layers" else ...] = leaf


def _add(stack: dict[_Path, np.ndarray], place: Place, params: Any, layers: list[int]) -> None:
    """x W + b + s ((x V + c) U + d) = x (W + s V U) + (b + s (c U + d))."""
    path, scale = _projection(place), place.adapter.scale
    scale = params["scale"][:, None, None] if scale == "learned" else scale
    down, up = params["down"], params["up"]
    stack[*path, "kernel"][layers] += scale * (down["kernel"] @ up["kernel"])
    if "bias" in down:
        bias = scale * (down["bias"][..., None, :] @ up["kernel"] + up["bias"][..., None, :])
        stack[*path, "bias"][layers] += bias[..., 0, :]


def _multiply(stack: dict[_Path, np.ndarray], place: Place, params: Any, layers: list[int]) -> None:
    """(x W + b) l = x (W l) + b l, with l on the columns of W; (x l) W, with l on its rows."""
    path, factor = _projection(place), params["scale"]
    if place.adapter.site in _INPUTS:
        stack[*path, "kernel"][layers] *= factor[..., :, None]
    else:
        stack[*path, "kernel"][layers] *= factor[..., None, :]
        stack[*path, "bias"][layers] *= factor


def _projection(place: Place) -> _Path:
    """The projection that an adapter changes there."""
    layers, block, projection = _PROJECTIONS[place.adapter.site]
    return layers, f"{'cross_' * (place.attention == 'cross')}{block}", projection
