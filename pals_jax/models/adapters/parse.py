"""Reading a method from text: an expression, such as `pals(size=204) + pooler()`, or JSON.

Besides its own options every method has two that say where it acts in an encoder-decoder, as in
`lora(rank=8, blocks=("decoder",), attention=("cross",))`; see `places.within`.
"""

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from pals_jax.models.adapters import serialize
from pals_jax.models.adapters.methods import METHODS
from pals_jax.models.adapters.places import within
from pals_jax.models.adapters.spec import Method
from pals_jax.runtime.errors import UserError

_WHERE = ("blocks", "attention")


def parse_method(text: str) -> Method:
    """The method that a text names.

    Args:
        text: an expression such as `pals(size=204) + pooler()`; or the JSON of `serialize.dumps`,
            which task files hold.

    Raises:
        UserError: neither of the two, an unknown method, an unknown or ill-typed option.
    """
    if text.lstrip().startswith("["):
        return serialize.loads(text)
    try:
        terms = _terms(ast.parse(text.strip(), mode="eval").body)
        calls = [_call(term) for term in terms]
    except (SyntaxError, ValueError):
        raise UserError(
            f"cannot read the method {text!r}; write it as a name with options,"
            ' for example pals(size=204, layers="final_half"), or several with + between.'
        ) from None
    method: Method = ()
    for name, options in calls:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}; known are {', '.join(METHODS)}.")
        where = _places(name, options)
        own = {option: value for option, value in options.items() if option not in where}
        _check_options(name, own)
        method += within(METHODS[name](**own), **where)
    return method


def title(text: str) -> str:
    """What tables and sentences call the method of a text: the expression; of JSON, its parts."""
    if text.lstrip().startswith("["):
        return " + ".join(part.name for part in serialize.loads(text))
    return text


def _places(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that say where a method acts.

    The number of `blocks` of a method on top of the encoder is an option of its own.
    """
    own = inspect.signature(METHODS[name]).parameters
    return {
        option: value
        for option, value in options.items()
        if option in _WHERE and (option not in own or isinstance(value, tuple))
    }


def _check_options(name: str, options: Mapping[str, object]) -> None:
    """Refuses options that the method has not, and values that are of another kind than its own."""
    known = inspect.signature(METHODS[name]).parameters
    for option, value in options.items():
        if option not in known:
            has = ", ".join(known) or "none"
            raise UserError(f"the method {name} has no option {option!r}; its options are {has}.")
        default, annotation = known[option].default, str(known[option].annotation)
        number = isinstance(default, float) and "learned" not in annotation
        if isinstance(default, bool) != isinstance(value, bool) or (
            number and not isinstance(value, int | float)
        ):
            kind = "True or False" if isinstance(default, bool) else "a number"
            raise UserError(f"the option {option} of {name} is {kind}, not {value!r}.")


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    """The name and the options of one call, or of a bare name."""
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
        raise ValueError
    options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    if len(options) < len(call.keywords) or "None" in options:  # repeated, or **options
        raise ValueError
    # Lists become tuples: a method is a value that a module may hold.
    return call.func.id, {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
