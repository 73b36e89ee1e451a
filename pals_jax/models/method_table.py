"""The methods as a table: each one's place in the design space (He et al. 2022, section 3)."""

import dataclasses
import functools
import inspect
import re
from typing import TYPE_CHECKING, Any, Literal

from pals_jax.models import counts
from pals_jax.models.adapters import methods
from pals_jax.models.adapters.forms import Form, Prompt, Scale
from pals_jax.models.adapters.spec import Adapter, TaskCopy
from pals_jax.models.architectures import Model
from pals_jax.models.bart import BartConfig
from pals_jax.models.bert import BertConfig
from pals_jax.models.multitask import MultiTaskModel
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    *("method", "site", "form", "input", "composition"),
    *("shared by layers", "layers", "parameters", "on BART-large"),
)
_INPUTS = {
    "block_input": "block's input",
    "state": "state",
    "normalised": "LN(state)",
}
_COMPOSITIONS = {
    "gate": "(1 - λ) h + λ dh",
    "multiply": "h * dh",
    "replace": "dh",
    "concat": "[h; dh]",
}
_OF_A_LAYER = ("ffn_norm/scale", "ffn_norm/bias", "ffn/output/kernel")


@functools.cache
def rows() -> list[dict[str, str]]:
    """One row for each part of each method at its default options, under `COLUMNS`.

    The last columns count what a task adds with the whole method, on BERT-base and BART-large,
    biases in, heads out.
    """
    table = []
    for name, method in methods.METHODS.items():
        parts = method()
        sizes = (
            _count(MultiTaskModel(BertConfig(), (2,), parts)),
            _count(Seq2SeqModel(BartConfig(), 1, parts)),
        )
        cells: list[tuple[str, ...]] = [_cells(part) for part in parts] or [("",) * 6]
        for index, row in enumerate(cells):
            first = (f"{name}{_options(method)}", *sizes) if index == 0 else ("", "", "")
            table.append(dict(zip(COLUMNS, (first[0], *row, *first[1:]), strict=True)))
    return table


def _count(model: Model) -> str:
    """What a task adds; nothing where a part of the method has no place in the model."""
    try:
        return f"{counts.count(model).per_task:,}"
    except UserError:
        return ""


def table() -> "Table":
    """For a person."""
    from rich.table import Table

    rich = Table(title="methods, at their default options", title_justify="left")
    for column in COLUMNS:
        justify: Literal["right", "left"] = "right" if column in COLUMNS[-2:] else "left"
        rich.add_column(column, justify=justify, no_wrap=True)
    for row in rows():
        method, *cells = row.values()
        rich.add_row(method.split("(")[0], *cells)  # a terminal has no room for the options
    return rich


def markdown() -> str:
    """For the documentation."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(row.values()) for row in rows())]
    rows_ = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows_)


def _options(method: Any) -> str:
    """The options of a method and their defaults."""
    options = inspect.signature(method).parameters.values()
    return f"({', '.join(f'{option.name}={option.default!r}' for option in options)})"


def _cells(part: Adapter | TaskCopy) -> tuple[str, ...]:
    layers = part.layers if isinstance(part.layers, str) else ", ".join(map(str, part.layers))
    if isinstance(part, TaskCopy):
        in_layers = any(re.match(part.pattern, f"layers/{name}") for name in _OF_A_LAYER)
        return (part.pattern, "own copy", "", "replace", "", layers if in_layers else "")
    return (
        part.site,
        _form(part.form),
        "" if isinstance(part.form, Scale | Prompt) else _INPUTS[part.reads],
        _composition(part),
        ", ".join(part.shared),
        layers if part.layer_indices(2) else "",
    )


def _composition(adapter: Adapter) -> str:
    if adapter.compose != "add":
        return _COMPOSITIONS[adapter.compose]
    if adapter.scale == "learned":
        return "h + s dh"
    return "h + dh" if adapter.scale == 1.0 else f"h + {adapter.scale:g} dh"


def _form(form: Form) -> str:
    """Its name, and the options that are not the form's defaults."""
    options = []
    for field in dataclasses.fields(form):  # type: ignore[arg-type]
        value = getattr(form, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            options.append(f"{field.name}={value}")
    return f"{type(form).__name__}({', '.join(options)})"
