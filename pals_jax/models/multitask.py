"""The model: one encoder, a task-indexed collection of adapters and heads.

    logits = model.apply(variables, input_ids, token_type_ids, attention_mask, task_ids)

`variables["params"]` is the shared encoder; `variables["adapters"]` is everything that belongs to
tasks, each leaf with a leading task axis. The task is a traced array, so that one compilation
serves all tasks. Dropout is on exactly where rngs={"dropout": key} is passed.

Dimension letters: see `pals_jax.models.layers`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pals_jax.errors import UserError
from pals_jax.models import adapters as adapters_lib
from pals_jax.models.adapters import Adapter, Stack, TaskAdapters
from pals_jax.models.bert import BertConfig
from pals_jax.models.encoder import Encoder
from pals_jax.models.forms import Theta, dense, project
from pals_jax.models.layers import dropout


class MultiTaskModel(nn.Module):
    """An encoder with adapters and one head for each task.

    Attributes:
        config: the encoder's architecture.
        num_outputs: for each of the T tasks its number of classes, or 1 for regression.
        adapters: a method, as the functions of `pals_jax.models.methods` return it.
        dtype: dtype of the computation; parameters stay float32, logits are float32.
        remat: recompute activations in the backward pass, layer by layer.
    """

    config: BertConfig
    num_outputs: tuple[int, ...]
    adapters: tuple[Adapter, ...] = ()
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        names = [adapter.name for adapter in self.adapters] + ["head"]
        if len(set(names)) < len(names):
            raise UserError(f"adapters need names of their own, and not 'head': {names[:-1]}.")
        self.encoder = Encoder(self.config, self.dtype, self.remat)
        hidden_size, depth = self.config.hidden_size, self.config.num_hidden_layers
        self.thetas = {
            a.name: self.variable("adapters", a.name, self._init, a.parameters(hidden_size, depth))
            for a in self.adapters
        }
        head = {k: Stack(v) for k, v in dense(hidden_size, max(self.num_outputs)).items()}
        self.head = self.variable("adapters", "head", lambda: self._mask_head(self._init(head)))

    def _init(self, stacks: Any) -> Theta:
        return adapters_lib.init(self.make_rng("params"), stacks, len(self.num_outputs))

    def _mask_head(self, head: Theta) -> Theta:
        """kernel [T, D, C] and bias [T, C], zero beyond a task's own number of outputs."""
        exists = self._output_exists()
        return {"kernel": head["kernel"] * exists[:, None, :], "bias": head["bias"] * exists}

    def _output_exists(self) -> np.ndarray:
        """bool [T, C]: heads are padded to the largest number of outputs."""
        return np.arange(max(self.num_outputs)) < np.asarray(self.num_outputs)[:, None]

    def __call__(
        self, input_ids: Array, token_type_ids: Array, attention_mask: Array, task_ids: Array
    ) -> Array:
        """Logits of each row under the head of its task.

        Args:
            input_ids: int [B, L].
            token_type_ids: int [B, L].
            attention_mask: int [B, L]; 0 at padding.
            task_ids: int, a scalar, [B], or [G] with G dividing B: the task of each of G equal,
                consecutive groups of rows.

        Returns:
            float32 [B, C]; beyond the task's own number of outputs the lowest finite value.

        Raises:
            UserError: a task id out of range. Under a trace it cannot be seen; the row is NaN.
            ValueError: shapes that do not fit together.
        """
        hidden = self.encode(input_ids, token_type_ids, attention_mask, task_ids)
        return self.classify(self.pool(hidden), task_ids)

    def encode(
        self, input_ids: Array, token_type_ids: Array, attention_mask: Array, task_ids: Array
    ) -> Array:
        """The last hidden states [B, L, D]; arguments as for `__call__`."""
        self._check_length(input_ids.shape[1])
        groups = self._task_groups(task_ids, input_ids.shape[0])
        adapters = TaskAdapters(
            self.adapters,
            {name: adapters_lib.select(v.value, groups) for name, v in self.thetas.items()},
            self.config.num_hidden_layers,
            self.config.attention_probs_dropout_prob,
        )
        return self.encoder(input_ids, token_type_ids, attention_mask, adapters)

    def pool(self, hidden: Array) -> Array:
        """[B, L, D] -> [B, D]: the encoder's pooler on the first position."""
        return self.encoder.pool(hidden)

    def classify(self, pooled: Array, task_ids: Array) -> Array:
        """[B, D] -> float32 logits [B, C] under the heads of the rows' tasks."""
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        pooled = dropout(pooled.astype(jnp.float32), self.config.hidden_dropout_prob, key)
        groups = self._task_groups(task_ids, pooled.shape[0])
        logits = project(adapters_lib.select(self.head.value, groups), pooled)
        exists = jnp.asarray(self._output_exists())[groups]
        exists = jnp.repeat(exists, logits.shape[0] // groups.shape[0], axis=0)
        return jnp.where(exists, logits, jnp.finfo(logits.dtype).min)

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
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"sequence length {length} is above the encoder's position table of"
                f" {self.config.max_position_embeddings}; shorten max_length."
            )


def init_variables(model: MultiTaskModel, key: Array) -> dict[str, Any]:
    """Random `variables` of a model; with `jax.eval_shape` their shapes only."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dict(model.init(key, tokens, tokens, tokens, jnp.int32(0)))
