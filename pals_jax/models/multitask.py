"""The model: one encoder, a task-indexed collection of adapters and heads.

    logits = model.apply(variables, input_ids, token_type_ids, attention_mask, task_ids)

`variables["params"]` is the shared encoder; `variables["adapters"]` is everything that belongs to
tasks, each leaf with a leading task axis. The task is a traced array, so that one compilation
serves all tasks. Dropout is on exactly where rngs={"dropout": key} is passed.

Dimension letters: see `pals_jax.models.layers`.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.models.adapters import spec as spec_lib
from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.forms import Params, dense, project
from pals_jax.models.adapters.spec import Method, Repeated
from pals_jax.models.bert import BertConfig
from pals_jax.models.dropout import dropout
from pals_jax.models.encoder import Encoder
from pals_jax.models.segments import Packing, Places
from pals_jax.models.stack import given_or
from pals_jax.models.task_rows import Own, by_row, declare
from pals_jax.runtime.errors import UserError


class MultiTaskModel(nn.Module):
    """An encoder with adapters and one head for each task; rows: see `task_rows`.

    Attributes:
        config: the encoder's architecture.
        num_outputs: for each of the T tasks its number of classes, or 1 for regression.
        method: as the functions of `pals_jax.models.adapters.methods` return it.
        dtype: dtype of the computation; parameters stay float32, logits are float32.
        remat: recompute each whole layer in the backward pass, matrix products included.
    """

    config: BertConfig
    num_outputs: tuple[int, ...]
    method: Method = ()
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.encoder = given_or(self, "encoder", self._init_encoder)
        params = {"encoder": self.encoder}
        parts = declare(self, self.method, self.config.stacks, params, len(self.num_outputs))
        self.adapter_params = {**parts, "head": self.variable("adapters", "head", self._init_head)}

    def declare(self) -> None:
        """Declares all variables, which `setup` has done by now: `init` needs no forward pass."""

    @property
    def _width(self) -> int:
        return max(self.num_outputs)

    def _modules(self) -> Encoder:
        # Without a parent, because some of the parameters it is applied to may be a task's copies.
        return Encoder(self.config, self.dtype, self.remat, parent=None)

    def _init_encoder(self, key: Array) -> Params:
        return self._modules().init(key, method="everything")["params"]

    def _init_head(self) -> Params:
        """kernel [T, D, C] and bias [T, C], zero beyond a task's own number of outputs."""
        params = {k: Repeated(v) for k, v in dense(self.config.hidden_size, self._width).items()}
        head = spec_lib.init(self.make_rng("params"), params, len(self.num_outputs))
        exists = self._output_exists()
        return {"kernel": head["kernel"] * exists[:, None, :], "bias": head["bias"] * exists}

    def _output_exists(self) -> np.ndarray:
        """bool [T, C]: heads are padded to the largest number of outputs."""
        return np.arange(self._width) < np.asarray(self.num_outputs)[:, None]

    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array,
        attention_mask: Array,
        task_ids: Array,
        active: Array | None = None,
        packing: Packing | None = None,
        slot_tasks: Array | None = None,
        hidden: Array | None = None,
    ) -> Array:
        """Logits of each row, or of each example of every row, under the head of its task.

        Args:
            input_ids: int [B, L].
            token_type_ids: int [B, L].
            attention_mask: int [B, L]; 0 at padding, 1 elsewhere, or, with `packing`, from 1, which
                of its row's examples a position belongs to.
            task_ids: int, a scalar, [B], or [G] with G dividing B: the task of each of G equal,
                consecutive groups of rows.
            active: bool [N]; the layers that keep their adapters. None: all.
            packing: where the M examples of each row are. None: each row is one.
            slot_tasks: int [U]; the tasks, on the task axis, whose rows the `adapters` collection
                holds here; `task_ids` then index these U slots. None: it holds all T tasks.
            hidden: [B, L, D] in `dtype`; the output of the layers that all tasks share
                (`encoder.layers_below`), which are then skipped. None: all layers are computed.

        Returns:
            float32 [B, C], with `packing` [B, M, C]; beyond the task's own number of outputs the
            lowest finite value.

        Raises:
            UserError: a task id out of range. Under a trace it cannot be seen; the row is NaN.
            ValueError: shapes that do not fit together.
        """
        tokens = input_ids, token_type_ids, attention_mask
        hidden = self.encode(*tokens, task_ids, active, packing, hidden)
        return self.classify(self.pool(hidden, task_ids, packing), task_ids, packing, slot_tasks)

    def every_task(
        self,
        input_ids: Array,
        token_type_ids: Array,
        attention_mask: Array,
        packing: Packing | None = None,
    ) -> Array:
        """What `__call__` gives under every task, [T, ...]; arguments as there.

        The layers below the first adapter are the same for all tasks and computed once.
        """
        tokens = input_ids, token_type_ids, attention_mask
        tasks = jnp.arange(len(self.num_outputs))
        return jax.vmap(lambda task: self(*tokens, task, packing=packing))(tasks)

    def encode(
        self,
        input_ids: Array,
        token_type_ids: Array,
        attention_mask: Array,
        task_ids: Array,
        active: Array | None = None,
        packing: Packing | None = None,
        hidden: Array | None = None,
    ) -> Array:
        """The last hidden states [B, L, D]; arguments as for `__call__`."""
        if packing is None:
            self._check_length(input_ids.shape[1])

        def encode(adapter_params: Any, task: Array, own: Own, *inputs: Any) -> Array:
            *tokens, hidden = inputs
            adapters = TaskAdapters(self.method, adapter_params, self.config, active)
            params = adapters.own_outside(self.encoder)
            return self._apply(params, own.rngs, *tokens, adapters, own.first, own.salts, hidden)

        tokens = input_ids, token_type_ids, attention_mask
        return self._by_row(encode, task_ids, packing, *tokens, hidden)

    def pool(self, hidden: Array, task_ids: Array, packing: Packing | None = None) -> Array:
        """[B, L, D] -> [B, D] or [B, M, D]: the pooler on each example's first position."""

        def pool(adapter_params: Any, task: Array, own: Own, hidden: Array) -> Array:
            adapters = TaskAdapters(self.method, adapter_params, self.config)
            params = adapters.own_outside(self.encoder)
            return self._apply(
                params, own.rngs, hidden, adapters, own.first, own.salts, method="pool"
            )

        pooled = self._by_row(pool, task_ids, packing, hidden)
        return pooled[:, 0] if packing is None else pooled

    def classify(
        self,
        pooled: Array,
        task_ids: Array,
        packing: Packing | None = None,
        tasks: Array | None = None,
    ) -> Array:
        """[B, D] or [B, M, D] -> float32 logits [B, C] or [B, M, C] under the tasks' heads."""
        exists = jnp.asarray(self._output_exists())
        exists = exists if tasks is None else exists[tasks]

        def classify(adapter_params: Any, task: Array, own: Own, pooled: Array) -> Array:
            rate, key = self.config.hidden_dropout_prob, own.rngs.get("dropout")
            places = Places.of_examples(own.salts, pooled)
            pooled = dropout(pooled.astype(jnp.float32), rate, key, places)
            logits = project(adapter_params["head"], pooled)
            return jnp.where(exists[task][None, None], logits, jnp.finfo(logits.dtype).min)

        of_examples = pooled[:, None] if packing is None else pooled
        logits = self._by_row(classify, task_ids, packing, of_examples)
        return logits[:, 0] if packing is None else logits

    def _apply(self, params: Params, rngs: Any, *inputs: Any, **kwargs: Any) -> Array:
        """Applies the encoder with these parameters, some of which may be a task's copies."""
        return cast(Array, self._modules().apply({"params": params}, *inputs, rngs=rngs, **kwargs))

    def _by_row(
        self, run: Callable[..., Array], task_ids: Array, packing: Packing | None, *inputs: Any
    ) -> Array:
        """Maps `run(adapter_params, task, own, *inputs)` over the rows, each a batch of one."""
        collection = {name: v.value for name, v in self.adapter_params.items()}
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        num_tasks = len(self.num_outputs)
        return by_row(run, collection, task_ids, num_tasks, packing, key, *inputs)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise UserError(
                f"sequence length {length} is above the encoder's position table of"
                f" {self.config.max_length}; shorten max_length."
            )


def init_variables(model: nn.Module, key: Array) -> dict[str, Any]:
    """Random `variables` of a model."""
    return {"adapters": {}, **model.init(key, method="declare")}
