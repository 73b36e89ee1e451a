"""One shared encoder, many tasks, a few parameters each, in JAX and Flax.

    run = pals_jax.load("runs/demo")
    run.predict("The soup was cold.", task="sentiment")

The names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pals_jax.data.tasks import Task
    from pals_jax.inference.load import load
    from pals_jax.inference.run import Run
    from pals_jax.runtime.errors import UserError

__version__ = "0.1.0"
__all__ = ["Run", "Task", "UserError", "load"]

_MODULES = {
    "Run": "inference.run",
    "Task": "data.tasks",
    "UserError": "runtime.errors",
    "load": "inference.load",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
