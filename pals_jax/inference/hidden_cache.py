"""What lies below the first adapter of a frozen encoder: computed once for each example, and kept.

The lowest layers, which no task changes, are an encoder of their own. Without dropout they give an
example the same hidden states at every step: these are kept on disk beside its tokens, and training
and evaluation begin above.
"""

import dataclasses
import errno
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import jax
import numpy as np
from jax import Array

from pals_jax.data.batch import Batch
from pals_jax.data.tokenize import TokenizedSplit
from pals_jax.experiment.experiment import Experiment
from pals_jax.models.adapters.bound import TaskAdapters
from pals_jax.models.encoder import Encoder, layers_below
from pals_jax.models.multitask import adapter_shapes
from pals_jax.runtime import storage
from pals_jax.runtime.console import in_bytes, progress, say
from pals_jax.runtime.errors import UserError
from pals_jax.runtime.parallel import DataParallel

Tree = Any
_FORMAT = 1  # of the cache; to be raised when its content changes meaning


def with_hidden(experiment: Experiment, variables: Tree, splits: Tree) -> Tree:
    """The splits with `hidden`, out of the cache if they are there, and into it if not.

    Args:
        experiment: whose encoder is frozen.
        variables: {"params", ...}.
        splits: a tree of `TokenizedSplit`.

    Raises:
        UserError: the cache cannot be written.
    """
    below = HiddenCache.of(experiment, variables["params"]["encoder"])
    files = {below.file(split): split for split in jax.tree.leaves(splits)}
    size = in_bytes(sum(map(below.size, files.values())))
    say(
        f"what the lowest {below.encoder.config.num_hidden_layers} of"
        f" {experiment.architecture.num_hidden_layers} layers give is computed once for each"
        f" example, and kept in {experiment.cache_dir}: {size}"
    )
    try:
        below.write({file: split for file, split in files.items() if not file.is_file()})
    except OSError as error:
        raise UserError(
            f"cannot write {size} of hidden states to {experiment.cache_dir}: {error.strerror};"
            " make room, name another data.cache_dir, or set lower_dropout to True."
        ) from error
    return jax.tree.map(below.complete, splits)


def check_same(experiment: Experiment, given: Tree, restored: Tree) -> None:
    """Sees that what is kept, if anything, was computed with the encoder that a run began with.

    Args:
        experiment: of the run.
        given: {"params", ...}, with the weights of `config.encoder`.
        restored: those of the run's checkpoint.

    Raises:
        UserError: the layers below the first adapter differ.
    """
    if experiment.config.lower_dropout:
        return
    one, other = (
        HiddenCache.of(experiment, each["params"]["encoder"]) for each in (given, restored)
    )
    if one.digest.digest() != other.digest.digest():
        raise UserError(
            f"{experiment.config.encoder} is not the encoder that the run began with: the layers"
            " below the first adapter differ; name the one it began with as config.encoder."
        )


@dataclasses.dataclass(frozen=True)
class HiddenCache:
    """The layers below the first adapter, and where their hidden states are kept.

    Attributes:
        encoder: of these layers alone.
        params: its own.
        experiment: whose texts it reads.
        parallel: the devices of this host. Each host computes what it lacks, whatever the others
            have already.
    """

    encoder: Encoder
    params: Tree
    experiment: Experiment
    parallel: DataParallel

    @classmethod
    def of(cls, experiment: Experiment, params: Tree) -> Self:
        """Those of an experiment, whose encoder's parameters are `params`."""
        model = experiment.model()
        depth = layers_below(adapter_shapes(model))
        architecture = dataclasses.replace(model.config, num_hidden_layers=depth)
        layers = jax.tree.map(lambda x: x[:depth], params["layers"])
        parallel = DataParallel.over(jax.local_devices())
        own = parallel.put({"embeddings": params["embeddings"], "layers": layers})
        return cls(Encoder(architecture, model.dtype), own, experiment, parallel)

    @property
    def _token_size(self) -> int:
        """Bytes of one token's."""
        return self.encoder.config.hidden_size * self.encoder.dtype.itemsize

    def size(self, split: TokenizedSplit) -> int:
        """Bytes of a split's hidden states."""
        return len(split.tokens) * self._token_size

    def file(self, split: TokenizedSplit) -> Path:
        """Where they are kept, under the digest of all that they follow from."""
        digest = self.digest.copy()
        for x in (split.tokens, split.offsets, split.first):
            digest.update(np.ascontiguousarray(x).data)
        return self.experiment.cache_dir / f"{digest.hexdigest()}.hidden"

    def complete(self, split: TokenizedSplit) -> TokenizedSplit:
        """The split with its hidden states, which are there, memory-mapped."""
        shape = len(split.tokens), self.encoder.config.hidden_size
        hidden = np.memmap(self.file(split), self.encoder.dtype, "r", shape=shape)
        return dataclasses.replace(split, hidden=hidden)

    def write(self, missing: Mapping[Path, TokenizedSplit]) -> None:
        """Computes the hidden states of splits, each for a file.

        A file is written aside and then renamed: see `data.tokenize.tokenize_split`.

        Raises:
            OSError: there is no room for them.
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
        """Writes the hidden states of a split, each example where its tokens are."""
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
    def _step(self) -> Callable[[Tree, Tree], Array]:
        """The compiled step from the parameters and a batch to its hidden states, [B, L, D]."""
        axis_name = self.parallel.axis_name
        nothing = TaskAdapters((), {}, self.encoder.config)

        def step(params: Tree, batch: Batch) -> Array:
            apply = cast(Callable[..., Array], self.encoder.apply)
            hidden = apply({"params": params}, *batch.tokens, nothing, batch.first)
            if axis_name is None:
                return hidden
            return jax.lax.all_gather(hidden, axis_name, tiled=True)

        return self.parallel.compile(step)

    @functools.cached_property
    def digest(self) -> Any:
        """Of all that the hidden states follow from besides the texts."""
        # Kinds of devices round differently.
        facts = _FORMAT, self.encoder.config, self.encoder.dtype, jax.default_backend()
        digest = hashlib.sha256(repr(facts).encode())
        for path, x in jax.tree.leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(x).data)
        return digest


def as_if_kept(experiment: Experiment, split: TokenizedSplit) -> TokenizedSplit:
    """A split as a run of the experiment has it, for its shapes: hidden states take no memory."""
    if experiment.config.lower_dropout:
        return split
    zero = np.zeros((), experiment.model().dtype)
    shape = len(split.tokens), experiment.architecture.hidden_size
    return dataclasses.replace(split, hidden=np.broadcast_to(zero, shape))
