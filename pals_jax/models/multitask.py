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

from pals_jax.errors import UserError
from pals_jax.models import adapters as adapters_lib
from pals_jax.models.adapters import Method, Owned, Stack, TaskAdapters
from pals_jax.models.bert import BertConfig
from pals_jax.models.encoder import Encoder
from pals_jax.models.forms import Theta, dense, project
from pals_jax.models.layers import dropout


class MultiTaskModel(nn.Module):
    """An encoder with adapters and one head for each task.

    The rows of a batch come in G equal groups of one task each. One group is an ordinary forward
    pass with that task's parameters; `jax.vmap` makes it a pass over all groups, in which whatever
    the tasks share stays one matrix.

    Attributes:
        config: the encoder's architecture.
        num_outputs: for each of the T tasks its number of classes, or 1 for regression.
        method: as the functions of `pals_jax.models.methods` return it.
        dtype: dtype of the computation; parameters stay float32, logits are float32.
        remat: recompute activations in the backward pass, layer by layer.
    """

    config: BertConfig
    num_outputs: tuple[int, ...]
    method: Method = ()
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.encoder = self.param("encoder", self._init_encoder)
        adapters_lib.check(self.method, self.encoder, self.config.num_hidden_layers)
        head = {k: Stack(v) for k, v in dense(self.config.hidden_size, self._width).items()}
        self.thetas = {
            spec.name: self.variable("adapters", spec.name, self._init, spec)
            for spec in self.method
        } | {
            "head": self.variable("adapters", "head", lambda: self._mask_head(self._draw(head))),
        }

    @property
    def _width(self) -> int:
        return max(self.num_outputs)

    def _modules(self) -> Encoder:
        # Without a parent: it is applied to parameters some of which may be a task's own.
        return Encoder(self.config, self.dtype, self.remat, parent=None)

    def _init_encoder(self, key: Array) -> Theta:
        bare = TaskAdapters((), {}, self.config)
        ids = jnp.zeros((1, 1), jnp.int32)
        return self._modules().init(key, ids, bare, method="everything")["params"]

    def _init(self, spec: Any) -> Theta:
        if isinstance(spec, Owned):
            depth = self.config.num_hidden_layers
            return spec.copies(self.encoder, depth, len(self.num_outputs))
        return self._draw(spec.parameters(self.config))

    def _draw(self, stacks: Any) -> Theta:
        return adapters_lib.init(self.make_rng("params"), stacks, len(self.num_outputs))

    def _mask_head(self, head: Theta) -> Theta:
        """kernel [T, D, C] and bias [T, C], zero beyond a task's own number of outputs."""
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
    ) -> Array:
        """Logits of each row under the head of its task.

        Args:
            input_ids: int [B, L].
            token_type_ids: int [B, L].
            attention_mask: int [B, L]; 0 at padding.
            task_ids: int, a scalar, [B], or [G] with G dividing B: the task of each of G equal,
                consecutive groups of rows.
            active: bool [N]; the layers that keep their adapters. None: all.

        Returns:
            float32 [B, C]; beyond the task's own number of outputs the lowest finite value.

        Raises:
            UserError: a task id out of range. Under a trace it cannot be seen; the row is NaN.
            ValueError: shapes that do not fit together.
        """
        hidden = self.encode(input_ids, token_type_ids, attention_mask, task_ids, active)
        return self.classify(self.pool(hidden, task_ids), task_ids)

    def encode(
        self,
        input_ids: Array,
        token_type_ids: Array,
        attention_mask: Array,
        task_ids: Array,
        active: Array | None = None,
    ) -> Array:
        """The last hidden states [B, L, D]; arguments as for `__call__`."""
        self._check_length(input_ids.shape[1])

        def encode(thetas: Any, task: Array, rngs: Any, *tokens: Array) -> Array:
            adapters = TaskAdapters(self.method, thetas, self.config, active)
            params = adapters.own_outside(self.encoder)
            hidden = self._modules().apply({"params": params}, *tokens, adapters, rngs=rngs)
            return cast(Array, hidden)

        return self._by_group(encode, task_ids, input_ids, token_type_ids, attention_mask)

    def pool(self, hidden: Array, task_ids: Array) -> Array:
        """[B, L, D] -> [B, D]: the pooler on the first position."""

        def pool(thetas: Any, task: Array, rngs: Any, hidden: Array) -> Array:
            adapters = TaskAdapters(self.method, thetas, self.config)
            params = adapters.own_outside(self.encoder)
            pooled = self._modules().apply({"params": params}, hidden, rngs=rngs, method="pool")
            return cast(Array, pooled)

        return self._by_group(pool, task_ids, hidden)

    def classify(self, pooled: Array, task_ids: Array) -> Array:
        """[B, D] -> float32 logits [B, C] under the heads of the rows' tasks."""

        def classify(thetas: Any, task: Array, rngs: Any, pooled: Array) -> Array:
            rate = self.config.hidden_dropout_prob
            pooled = dropout(pooled.astype(jnp.float32), rate, rngs.get("dropout"))
            logits = project(thetas["head"], pooled)
            exists = jnp.asarray(self._output_exists())[task][None]
            return jnp.where(exists, logits, jnp.finfo(logits.dtype).min)

        return self._by_group(classify, task_ids, pooled)

    def _by_group(self, run: Callable[..., Array], task_ids: Array, *rows: Array) -> Array:
        """`run(thetas, task, rngs, *rows)` for every group of rows of one task, side by side."""
        groups = self._task_groups(task_ids, rows[0].shape[0])
        thetas = {name: adapters_lib.select(v.value, groups) for name, v in self.thetas.items()}
        rngs = {}
        if self.has_rng("dropout"):
            rngs["dropout"] = jax.random.split(self.make_rng("dropout"), groups.shape[0])
        grouped = (x.reshape(groups.shape[0], -1, *x.shape[1:]) for x in rows)
        out = jax.vmap(run)(thetas, groups, rngs, *grouped)
        return out.reshape(-1, *out.shape[2:])

    def _task_groups(self, task_ids: Array, rows: int) -> Array:
        """`task_ids` as int [G], refused where it can be seen to be wrong."""
        groups = jnp.atleast_1d(task_ids)
        if groups.ndim != 1 or rows % groups.shape[0]:
            raise ValueError(f"task_ids of shape {groups.shape} cannot be dealt to {rows} rows.")
        if not isinstance(groups, jax.core.Tracer):
            num_tasks = len(self.num_outputs)
            wrong = [int(task) for task in groups if not 0 <= task < num_tasks]
            if wrong:
                raise UserError(
                    f"task id {wrong[0]} is out of range; the model's {num_tasks} tasks are"
                    f" 0 to {num_tasks - 1}."
                )
        return groups

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise UserError(
                f"sequence length {length} is above the encoder's position table of"
                f" {self.config.max_length}; shorten max_length."
            )


def init_variables(model: MultiTaskModel, key: Array) -> dict[str, Any]:
    """Random `variables` of a model; with `jax.eval_shape` their shapes only."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dict(model.init(key, tokens, tokens, tokens, jnp.int32(0)))
