"""A method as JSON, for files that must mean the same when an expression's defaults have changed.

A list with one object for each part, its class as "type" and its fields beside that:

    [{"type": "Adapter", "name": "lora_query", ..., "form": {"type": "Bottleneck", ...}}, ...]
"""

import dataclasses
import json
from typing import Any

from pals_jax.models.adapters import blocks, forms, pooling
from pals_jax.models.adapters.spec import Adapter, Method, TaskCopy
from pals_jax.runtime.errors import UserError

_FORMS = (
    *(blocks.Blocks, forms.Bottleneck, forms.Dense, forms.Prefix, forms.ProjectedAttention),
    *(forms.ProjectedFeedForward, forms.Prompt, forms.Scale, pooling.Identity, pooling.Mean),
)
_TYPES = {each.__name__: each for each in (Adapter, TaskCopy, *_FORMS)}


def dumps(method: Method) -> str:
    """The JSON of a method; `loads` gives an equal one."""
    return json.dumps([_to_json(part) for part in method])


def loads(text: str) -> Method:
    """The method that `dumps` wrote.

    Raises:
        UserError: the text is no such JSON, or has parts that this version does not know.
    """
    try:
        method = tuple(_from_json(part) for part in json.loads(text))
        if not all(isinstance(part, Adapter | TaskCopy) for part in method):
            raise TypeError("a part is no adapter")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read the method {text[:60]!r}... as JSON ({error!r}); it was changed by hand,"
            " or written by a newer version of pals_jax."
        ) from error
    return method


def _to_json(value: Any) -> Any:
    if type(value) in _TYPES.values():
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__} | {k: _to_json(v) for k, v in fields.items()}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        fields = {name: _from_json(field) for name, field in value.items()}
        return _TYPES[fields.pop("type")](**fields)
    return tuple(value) if isinstance(value, list) else value
