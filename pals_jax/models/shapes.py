"""The shapes of a model's variables, computed from its parts without tracing the model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.forms import Params, dense
from pals_jax.models.adapters.places import check, places
from pals_jax.models.adapters.spec import Repeated, TaskCopy
from pals_jax.models.architectures import Architecture, Model, num_tasks
from pals_jax.models.bart import BartConfig
from pals_jax.models.encoder import Encoder
from pals_jax.models.encoder_decoder import PARTS, init_params
from pals_jax.models.multitask import MultiTaskModel


def variable_shapes(model: Model) -> dict[str, Any]:
    """The shapes of `multitask.init_variables`, as `jax.ShapeDtypeStruct`: no array is built.

    An architecture is traced only once for all its models.

    Raises:
        UserError: if parts of the method collide, or have no place.
    """
    tasks, stacks = num_tasks(model), model.config.stacks

    def zeros(leaf: Repeated) -> Any:
        return jnp.zeros((tasks, *leaf.sizes, *leaf.param.shape), jnp.float32)

    def adapters(params: Params) -> Params:
        check(model.method, stacks, params)
        tree: dict[str, Any] = {}
        if isinstance(model, MultiTaskModel):
            head = dense(model.config.hidden_size, max(model.num_outputs))
            tree["head"] = {name: zeros(Repeated(param)) for name, param in head.items()}
        for block, config in stacks.items():
            for place in places(model.method, block):
                if isinstance(place.part, TaskCopy):
                    depth = config.num_hidden_layers
                    tree[place.name] = place.part.copies(params[block], depth, tasks)
                elif place.has_parameters(config):
                    parameters = place.part.parameters(config)
                    is_repeated = lambda x: isinstance(x, Repeated)  # noqa: E731
                    tree[place.name] = jax.tree.map(zeros, parameters, is_leaf=is_repeated)
        return tree

    params = _params(model.config)
    return {"params": params, "adapters": jax.eval_shape(adapters, params)}


def adapter_shapes(model: Model) -> TaskAdapters:
    """A model's method with the shapes of its parameters, task axis in, to ask where they are.

    Of an encoder-decoder, what is in its encoder.
    """
    shapes = variable_shapes(model)["adapters"]
    return TaskAdapters(model.method, shapes, model.config.stacks["encoder"])


@functools.cache
def _params(config: Architecture) -> Params:
    def init(key: Any) -> Any:
        if isinstance(config, BartConfig):
            return {part: init_params(config, part, key) for part in PARTS}
        encoder = Encoder(config, parent=None)
        return {"encoder": encoder.init(key, method="everything")["params"]}

    return jax.eval_shape(init, jax.random.key(0))
