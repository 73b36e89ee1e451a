"""Import and export of foreign checkpoints: one table of tensor names per format.

A format's module is imported lazily, on first access to one of its functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pals_jax.convert.adapterhub import from_adapterhub, to_adapterhub
    from pals_jax.convert.bart import to_conditional_generation
    from pals_jax.convert.bert_n_pals import from_bert_n_pals, to_bert_n_pals
    from pals_jax.convert.huggingface import from_huggingface
    from pals_jax.convert.peft import from_peft, to_peft
    from pals_jax.convert.sequence_classification import (
        from_sequence_classification,
        to_sequence_classification,
    )
    from pals_jax.convert.tensor_files import read_tensors
    from pals_jax.convert.tf_bert import from_tf_bert, to_tf_bert
    from pals_jax.convert.tf_checkpoint import read_tf_checkpoint
    from pals_jax.convert.unified_view import from_unified_view, to_unified_view

_MODULES = {
    "from_adapterhub": "adapterhub",
    "from_bert_n_pals": "bert_n_pals",
    "from_huggingface": "huggingface",
    "from_peft": "peft",
    "from_sequence_classification": "sequence_classification",
    "from_tf_bert": "tf_bert",
    "from_unified_view": "unified_view",
    "read_tensors": "tensor_files",
    "read_tf_checkpoint": "tf_checkpoint",
    "to_adapterhub": "adapterhub",
    "to_bert_n_pals": "bert_n_pals",
    "to_conditional_generation": "bart",
    "to_peft": "peft",
    "to_sequence_classification": "sequence_classification",
    "to_tf_bert": "tf_bert",
    "to_unified_view": "unified_view",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = [
    "from_adapterhub",
    "from_bert_n_pals",
    "from_huggingface",
    "from_peft",
    "from_sequence_classification",
    "from_tf_bert",
    "from_unified_view",
    "read_tensors",
    "read_tf_checkpoint",
    "to_adapterhub",
    "to_bert_n_pals",
    "to_conditional_generation",
    "to_peft",
    "to_sequence_classification",
    "to_tf_bert",
    "to_unified_view",
]
