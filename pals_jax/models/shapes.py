"""The shapes of a model's variables, computed from its parts without tracing the model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pals_jax.models.adapters import spec as spec_lib
from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.forms import Params, dense
from pals_jax.models.adapters.spec import Stack, TaskCopy
from pals_jax.models.bert import BertConfig
from pals_jax.models.encoder import Encoder
from pals_jax.models.multitask import MultiTaskModel


def variable_shapes(model: MultiTaskModel) -> dict[str, Any]:
    """The shapes of `multitask.init_variables`, as `jax.ShapeDtypeStruct`: no array is built.

    An encoder is traced only once for all its models.

    Raises:
        UserError: if parts of the method collide.
    """
    config, num_tasks, depth = model.config, len(model.num_outputs), model.config.num_hidden_layers

    def zeros(stack: Stack) -> Any:
        return jnp.zeros((num_tasks, *stack.sizes, *stack.param.shape), jnp.float32)

    def adapters(encoder: Params) -> Params:
        spec_lib.check(model.method, encoder, depth)
        head = dense(config.hidden_size, max(model.num_outputs))
        tree: dict[str, Any] = {"head": {name: zeros(Stack(param)) for name, param in head.items()}}
        for spec in model.method:
            if isinstance(spec, TaskCopy):
                tree[spec.name] = spec.copies(encoder, depth, num_tasks)
            else:
                stacks = spec.parameters(config)
                is_stack = lambda x: isinstance(x, Stack)  # noqa: E731
                tree[spec.name] = jax.tree.map(zeros, stacks, is_leaf=is_stack)
        return tree

    encoder = _encoder(config)
    return {"params": {"encoder": encoder}, "adapters": jax.eval_shape(adapters, encoder)}


def adapter_shapes(model: MultiTaskModel) -> TaskAdapters:
    """A model's method with the shapes of its parameters, task axis in, to ask where they are."""
    return TaskAdapters(model.method, variable_shapes(model)["adapters"], model.config)


@functools.cache
def _encoder(config: BertConfig) -> Params:
    def init() -> Any:
        return Encoder(config, parent=None).init(jax.random.key(0), method="everything")["params"]

    return jax.eval_shape(init)
