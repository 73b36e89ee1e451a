"""Cache of the hidden states below the first adapter of a frozen encoder.

No task changes these lowest layers, so without dropout an example's hidden states there are the
same at every step. They are computed once per example and cached on disk next to its tokens;
training and evaluation start above.
"""

import dataclasses
import errno
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar, cast

import jax
import numpy as np
import optax
from jax import Array

from pals_jax.data.batch import Batch
from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment.experiment import Experiment
from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.architectures import Model
from pals_jax.models.bart import BartConfig, Vocabulary
from pals_jax.models.encoder import Encoder
from pals_jax.models.encoder_decoder import TextStack
from pals_jax.models.seq2seq import Seq2SeqModel
from pals_jax.models.shapes import adapter_shapes
from pals_jax.models.stack import layers_below
from pals_jax.models.transformer import StackConfig
from pals_jax.runtime import storage
from pals_jax.runtime.console import in_bytes, progress, say
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel

Tree = TypeVar("Tree")
_FORMAT = 1  # format version of the cache; increment when the meaning of its content changes


def with_hidden(experiment: Experiment, variables: optax.Params, splits: Tree) -> Tree:
    """The splits with `hidden`, from the cache; what it lacks is computed and cached.

    Args:
        experiment: an experiment with a frozen encoder.
        variables: {"params", ...}.
        splits: a tree of `TokenizedSplit`.

    Raises:
        UserError: if the cache cannot be written.
    """
    below = HiddenCache.of(experiment, variables["params"])
    files = {below.file(split): split for split in jax.tree.leaves(splits)}
    size = in_bytes(sum(map(below.size, files.values())))
    say(
        f"the hidden states of the lowest {below.config.num_hidden_layers} of"
        f" {experiment.architecture.stacks['encoder'].num_hidden_layers} layers are computed once"
        " for each example"
        f" and cached in {experiment.cache_dir}: {size}"
    )
    try:
        below.write({file: split for file, split in files.items() if not file.is_file()})
    except OSError as error:
        raise UserError(
            f"cannot write {size} of hidden states to {experiment.cache_dir}: {error.strerror};"
            " make room, name another data.cache_dir, or set lower_dropout to True."
        ) from error
    return jax.tree.map(below.complete, splits)


def check_same(experiment: Experiment, given: optax.Params, restored: optax.Params) -> None:
    """Checks that cached hidden states belong to the encoder that a run started with.

    Args:
        experiment: the experiment of the run.
        given: {"params", ...}, with the weights of `config.encoder`.
        restored: the same, from the run's checkpoint.

    Raises:
        UserError: if the layers below the first adapter differ.
    """
    if experiment.config.lower_dropout:
        return
    one, other = (HiddenCache.of(experiment, each["params"]) for each in (given, restored))
    if one.digest.digest() != other.digest.digest():
        raise UserError(
            f"{experiment.config.encoder} is not the encoder that the run began with: the layers"
            " below the first adapter differ; set config.encoder to the original encoder."
        )


@dataclasses.dataclass(frozen=True)
class HiddenCache:
    """The layers below the first adapter, and the cache of their hidden states.

    Attributes:
        config: the architecture of an encoder of these layers alone.
        dtype: of the computation.
        params: the parameters of these layers, and of the embeddings.
        apply: from these parameters and a batch to hidden states [B, L, D].
        experiment: the experiment with the texts.
        parallel: the devices of this host. Each host fills its own cache, independently of others.
    """

    config: StackConfig
    dtype: Any
    params: optax.Params
    apply: Callable[[optax.Params, Batch], Array]
    experiment: Experiment
    parallel: DataParallel

    @classmethod
    def of(cls, experiment: Experiment, params: optax.Params) -> Self:
        """The cache of an experiment; `params` is the whole collection of that name."""
        model = experiment.model()
        depth, encoder = layers_below(adapter_shapes(model)), params["encoder"]
        config = dataclasses.replace(model.config.stacks["encoder"], num_hidden_layers=depth)
        own = {"layers": jax.tree.map(lambda x: x[:depth], encoder["layers"])}
        if "embeddings" in encoder:  # those of Marian are words alone
            own["embeddings"] = encoder["embeddings"]
        if isinstance(model, Seq2SeqModel):
            own = {"encoder": own, "vocabulary": params["vocabulary"]}
        parallel = DataParallel.over(jax.local_devices())
        apply = partial(_lower, model, config)
        return cls(config, model.dtype, parallel.put(own), apply, experiment, parallel)

    @property
    def _token_size(self) -> int:
        """Bytes of one token's hidden state."""
        return self.config.hidden_size * self.dtype.itemsize

    def size(self, split: TokenizedSplit) -> int:
        """Bytes of a split's hidden states."""
        return len(split.tokens) * self._token_size

    def file(self, split: TokenizedSplit) -> Path:
        """The cache file of a split, named by the digest of everything its content depends on."""
        digest = self.digest.copy()
        for x in (split.tokens, split.offsets, split.first):
            digest.update(np.ascontiguousarray(x).data)
        return self.experiment.cache_dir / f"{digest.hexdigest()}.hidden"

    def complete(self, split: TokenizedSplit) -> TokenizedSplit:
        """The split with its cached hidden states, memory-mapped."""
        shape = len(split.tokens), self.config.hidden_size
        hidden = np.memmap(self.file(split), self.dtype, "r", shape=shape)
        return dataclasses.replace(split, hidden=hidden)

    def write(self, missing: Mapping[Path, TokenizedSplit]) -> None:
        """Computes the hidden states of splits and writes each to its file.

        A file is written elsewhere and then renamed: see `data.tokenize.tokenize_split`.

        Raises:
            OSError: if the disk is full.
        """
        if not missing:
            return
        directory = self.experiment.cache_dir
        directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(directory).free < sum(map(self.size, missing.values())):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with progress(sum(map(len, missing.values())), 0, "example") as bar:
            for path, split in missing.items():
                with storage.replacing(path) as built, built.open("wb") as file:
                    self._compute(split, file, bar)

    def _compute(self, split: TokenizedSplit, file: BinaryIO, bar: Any) -> None:
        """Writes the hidden states of a split, at the offsets of the examples' tokens."""
        for batch, examples in self.experiment.eval_batches(split, 0, self.parallel.shards):
            hidden = np.asarray(self._step(self.params, batch))
            begins = batch.first.reshape(examples.shape)
            for row, slot in np.argwhere(examples >= 0).tolist():
                start, stop = split.offsets[examples[row, slot] :][:2].tolist()
                begin = begins[row, slot]
                file.seek(start * self._token_size)
                file.write(hidden[row, begin : begin + stop - start].tobytes())
                bar.update()

    @functools.cached_property
    def _step(self) -> Callable[[optax.Params, Batch], Array]:
        """The compiled step from parameters and batch to hidden states [B, L, D]."""
        axis_name = self.parallel.axis_name

        def step(params: optax.Params, batch: Batch) -> Array:
            hidden = self.apply(params, batch)
            if axis_name is None:
                return hidden
            return jax.lax.all_gather(hidden, axis_name, tiled=True)

        return self.parallel.compile(step)

    @functools.cached_property
    def digest(self) -> Any:
        """The digest of everything that the hidden states depend on besides the texts."""
        # The backend is included because different kinds of devices round differently.
        facts: tuple[Any, ...] = _FORMAT, self.config, self.dtype, jax.default_backend()
        if isinstance(self.experiment.architecture, BartConfig):
            facts += (self.experiment.architecture.scale_embedding,)
        digest = hashlib.sha256(repr(facts).encode())
        for path, x in jax.tree.leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(x).data)
        return digest


def _lower(model: Model, config: Any, params: optax.Params, batch: Batch) -> Array:
    """What an encoder of the lower layers, of the architecture `config`, makes of a batch."""
    if isinstance(model, Seq2SeqModel):
        words = Vocabulary(model.config, model.dtype)
        embedded = words.apply({"params": params["vocabulary"]}, batch.input_ids)
        stack, inputs = TextStack(config, model.dtype), (embedded, batch.attention_mask)
        own = {"params": params["encoder"]}
        return cast(Array, stack.apply(own, *inputs, batch.first, method="lower"))
    nothing = TaskAdapters((), {}, config)
    encoder = Encoder(config, model.dtype)
    return cast(Array, encoder.apply({"params": params}, *batch.tokens, nothing, batch.first))


def as_if_kept(experiment: Experiment, split: TokenizedSplit) -> TokenizedSplit:
    """A split with placeholder hidden states of the right shape, which take no memory."""
    if experiment.config.lower_dropout:
        return split
    zero = np.zeros((), experiment.model().dtype)
    shape = len(split.tokens), experiment.architecture.stacks["encoder"].hidden_size
    return dataclasses.replace(split, hidden=np.broadcast_to(zero, shape))
