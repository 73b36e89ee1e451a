"""The sequence-to-sequence model: one encoder-decoder, a task-indexed collection of adapters.

    logits = model.apply(
        variables, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, task_ids
    )

`variables["params"]` is the shared encoder, decoder and vocabulary; `variables["adapters"]` is
everything that belongs to tasks, each leaf with a leading task axis. The task is a traced array, so
that one compilation serves all tasks. Dropout is on exactly where rngs={"dropout": key} is passed.

Dimension letters: see `pals_jax.models.layers`; a source has J positions, a target L.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.adapters.forms import Params
from pals_jax.models.adapters.spec import Method
from pals_jax.models.bart import BartConfig, Vocabulary
from pals_jax.models.encoder_decoder import (
    PARTS,
    Entries,
    KeysAndValues,
    TextStack,
    init_params,
)
from pals_jax.models.segments import Packing, Segments, make_segments, next_position
from pals_jax.models.stack import given_or
from pals_jax.models.task_rows import Own, by_row, declare
from pals_jax.runtime.errors import UserError


class ReadSource(NamedTuple):
    """What the steps of generation need of a source.

    Attributes:
        keys_and_values: of the cross attention of each layer of the decoder, [B, H, J, K] both.
        segment_ids: int [B, J]; 0 at padding. The decoder attends to all other positions of a row,
            so that of several sources in it one has to be chosen.
    """

    keys_and_values: KeysAndValues
    segment_ids: Array


class Seq2SeqModel(nn.Module):
    """An encoder-decoder with adapters for each task; rows: see `task_rows`.

    Attributes:
        config: the architecture.
        num_tasks: T.
        method: as the functions of `pals_jax.models.adapters.methods` return it.
        dtype: dtype of the computation; parameters stay float32, logits are float32.
        remat: recompute each whole layer in the backward pass, matrix products included.
    """

    config: BartConfig
    num_tasks: int = 1
    method: Method = ()
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.parts = {
            part: given_or(self, part, partial(init_params, self.config, part)) for part in PARTS
        }
        stacks = self.config.stacks
        self.adapter_params = declare(self, self.method, stacks, self.parts, self.num_tasks)

    def declare(self) -> None:
        """Declares all variables, which `setup` has done by now: `init` needs no forward pass."""

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        decoder_input_ids: Array,
        decoder_attention_mask: Array,
        task_ids: Array,
        packing: Packing | None = None,
        decoder_first: Array | None = None,
        hidden: Array | None = None,
    ) -> Array:
        """Logits of the token after each position of the targets.

        Args:
            input_ids: int [B, J]; the sources.
            attention_mask: int [B, J]; 0 at padding, 1 elsewhere, or, with `packing`, from 1, which
                of its row's examples a position belongs to.
            decoder_input_ids: int [B, L]; the targets, shifted to the right.
            decoder_attention_mask: int [B, L]; see `attention_mask`.
            task_ids: int, a scalar, [B], or [G] with G dividing B: the task of each of G equal,
                consecutive groups of rows.
            packing: where the M examples of each row of sources are. None: each row is one.
            decoder_first: int [B, M]; with `packing`, the position of the first token of each
                example in its row of targets.
            hidden: [B, J, D] in `dtype`; the output of the layers of the encoder that all tasks
                share (`stack.layers_below`), which are then skipped. None: all are computed.

        Returns:
            float32 [B, L, V].

        Raises:
            UserError: a task id out of range, or a text longer than the positions. Under a trace a
                task id cannot be seen; the row is NaN.
            ValueError: shapes that do not fit together.
        """
        texts = input_ids, attention_mask, decoder_input_ids, decoder_attention_mask
        return self.logits(self.decode(*texts, task_ids, packing, decoder_first, hidden))

    def decode(
        self,
        input_ids: Array,
        attention_mask: Array,
        decoder_input_ids: Array,
        decoder_attention_mask: Array,
        task_ids: Array,
        packing: Packing | None = None,
        decoder_first: Array | None = None,
        hidden: Array | None = None,
    ) -> Array:
        """The decoder's last hidden states [B, L, D]; arguments as for `__call__`."""
        if (packing is None) != (decoder_first is None):
            raise ValueError("packing is of sources and targets: give decoder_first with it.")
        if packing is None:
            self._check_length("source", input_ids.shape[1])
            self._check_length("target", decoder_input_ids.shape[1])
            decoder_first = jnp.zeros((len(input_ids), 1), jnp.int32)

        def decode(adapter_params: Any, task: Array, own: Own, *row: Any) -> Array:
            source, hidden, target, first = row
            encoded = self._run("encoder", adapter_params, own, source, hidden=hidden)
            # The decoder's dropout masks are others than the encoder's.
            rngs = {name: jax.random.fold_in(key, 1) for name, key in own.rngs.items()}
            own = Own(rngs, first, own.salts)
            return self._run("decoder", adapter_params, own, target, source=encoded)[0]

        source, target = (input_ids, attention_mask), (decoder_input_ids, decoder_attention_mask)
        return self._by_row(decode, task_ids, packing, source, hidden, target, decoder_first)

    def encode(
        self,
        input_ids: Array,
        attention_mask: Array,
        task_ids: Array,
        packing: Packing | None = None,
        hidden: Array | None = None,
    ) -> Array:
        """The encoder's last hidden states [B, J, D]; arguments as for `__call__`."""
        if packing is None:
            self._check_length("source", input_ids.shape[1])

        def encode(adapter_params: Any, task: Array, own: Own, *row: Any) -> Array:
            source, hidden = row
            encoded, _ = self._run("encoder", adapter_params, own, source, hidden=hidden)
            return encoded[:, : input_ids.shape[1]]  # without prompts

        return self._by_row(encode, task_ids, packing, (input_ids, attention_mask), hidden)

    def read(
        self,
        layers: tuple[Any, ...],
        input_ids: Array,
        attention_mask: Array,
        task_ids: Array,
        packing: Packing | None = None,
    ) -> ReadSource:
        """What the steps of generation need of the sources; leaves [B, ...].

        Args:
            layers: the parameters of each layer of the decoder; see `stack.unstacked`.
            input_ids: int [B, J]; the sources.
            attention_mask: as for `__call__`.
            task_ids: int, a scalar or [G]; see `__call__`.
            packing: as for `__call__`.
        """
        if packing is None:
            self._check_length("source", input_ids.shape[1])

        def read(adapter_params: Any, task: Array, own: Own, ids: Array, mask: Array) -> ReadSource:
            encoded, segments = self._run("encoder", adapter_params, own, (ids, mask))
            stack, params, adapters = self._stack("decoder", adapter_params)
            inputs = layers, encoded, segments, adapters
            read = stack.apply({"params": params}, *inputs, method="read_source")
            read = cast(tuple[tuple[Array, Array], ...], read)
            return ReadSource(read, segments.segment_ids)

        source = input_ids, attention_mask
        return cast(ReadSource, self._by_row(read, task_ids, packing, *source))

    def step(
        self,
        layers: tuple[Any, ...],
        tokens: Array,
        position: Array,
        visible: Array,
        sources: ReadSource,
        entries: Entries | None,
        task_ids: Array,
    ) -> tuple[Array, Entries]:
        """One step of generation: the decoder at one position of each row, in K variants of a text.

        It equals `decode` at that position, if the rows have been through all positions before.

        Args:
            layers: as for `read`.
            tokens: int [B, K]; the token of each variant at the position.
            position: int [B].
            visible: bool [B, K, J]; which keys of the cache a variant attends to, beside its own.
            sources: what `read` has returned.
            entries: of the cache, leaves [B, ..., J, size of a head]. None: all are zero.
            task_ids: as for `read`.

        Returns:
            The last hidden states [B, K, D] in `dtype`, and what to `kv_cache.write` to the cache,
            leaves [B, ..., K, size of a head].
        """

        def step(adapter_params: Any, task: Array, own: Own, *row: Any) -> tuple[Array, Entries]:
            tokens, position, visible, sources, entries = row
            stack, params, adapters = self._stack("decoder", adapter_params)
            read = sources.keys_and_values, make_segments(sources.segment_ids, own.first)
            segments = next_position(position, visible)
            inputs = layers, self._vocabulary(tokens), segments, adapters, read, entries
            out = stack.apply({"params": params}, *inputs, method="step")
            return cast(tuple[Array, Entries], out)

        rows = tokens, position, visible, sources, entries
        return cast(tuple[Array, Entries], self._by_row(step, task_ids, None, *rows))

    def _run(
        self,
        block: str,
        adapter_params: Params,
        own: Own,
        text: tuple[Array, Array],
        source: tuple[Array, Segments] | None = None,
        hidden: Array | None = None,
    ) -> tuple[Array, Segments]:
        """Applies the encoder or the decoder to rows of one task; see `TextStack`.

        `text` is the tokens and, of each, the example it belongs to, int [B, L] both.
        """
        stack, params, adapters = self._stack(block, adapter_params)
        ids, segment_ids = text
        inputs = self._vocabulary(ids), segment_ids, adapters, own.first, own.salts
        out = stack.apply({"params": params}, *inputs, source, hidden, rngs=own.rngs)
        return cast(tuple[Array, Segments], out)

    def _stack(self, block: str, adapter_params: Params) -> tuple[TextStack, Params, TaskAdapters]:
        """The encoder or the decoder, its parameters and its adapters, for rows of one task."""
        config = self.config.stacks[block]
        # Without a parent, because some of the parameters may be a task's copies.
        stack = TextStack(config, self.dtype, self.remat, block == "decoder", parent=None)
        adapters = TaskAdapters(self.method, adapter_params, config, block=block)
        return stack, adapters.own_outside(self.parts[block]), adapters

    def _vocabulary(self, *inputs: Array | None, **kwargs: Any) -> Array:
        module = Vocabulary(self.config, self.dtype, parent=None)
        params = {"params": self.parts["vocabulary"]}
        return cast(Array, module.apply(params, *inputs, **kwargs))

    def logits(self, hidden: Array) -> Array:
        """The decoder's last hidden states [B, L, D] -> float32 [B, L, V]."""
        return self._vocabulary(hidden, method="logits")

    def next_logits(self, hidden: Array, words: Array) -> Array:
        """The same for a step of generation, [B, K, D] -> float32 [B, K, V].

        Args:
            hidden: the hidden states.
            words: `self.words()`, which is computed once for all steps.
        """
        return self._vocabulary(hidden, words, method="next_logits")

    def words(self) -> Array:
        """The words' vectors, [V, D] in `dtype`."""
        return self._vocabulary(method="words")

    def _by_row(
        self, run: Callable[..., Any], task_ids: Array, packing: Packing | None, *inputs: Any
    ) -> Any:
        """Maps `run(adapter_params, task, own, *inputs)` over the rows, each a batch of one."""
        collection = {name: v.value for name, v in self.adapter_params.items()}
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return by_row(run, collection, task_ids, self.num_tasks, packing, key, *inputs)

    def _check_length(self, text: str, length: int) -> None:
        if length > self.config.max_length:
            raise UserError(
                f"a {text} of {length} tokens is above the model's {self.config.max_length}"
                " positions; shorten it."
            )
