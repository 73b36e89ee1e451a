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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import jax
import numpy as np
import optax

from pals_jax.data.tokenized import TokenizedSplit
from pals_jax.experiment.experiment import Experiment
from pals_jax.inference.lower_layers import LowerLayers
from pals_jax.models.bart import BartConfig
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
        f"the hidden states of the lowest {below.layers.depth} of"
        f" {experiment.architecture.stacks['encoder'].num_hidden_layers} layers are computed once"
        f" for each example and cached in {experiment.cache_dir}: {size}"
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
        layers: these layers, on the devices of this host. Each host fills its own cache,
            independently of others.
        experiment: the experiment with the texts.
    """

    layers: LowerLayers
    experiment: Experiment

    @classmethod
    def of(cls, experiment: Experiment, params: optax.Params) -> Self:
        """The cache of an experiment; `params` is the whole collection of that name."""
        parallel = DataParallel.over(jax.local_devices())
        return cls(LowerLayers.of(experiment.model(), params, parallel), experiment)

    @property
    def _token_size(self) -> int:
        """Bytes of one token's hidden state."""
        return self.layers.config.hidden_size * self.layers.dtype.itemsize

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
        shape = len(split.tokens), self.layers.config.hidden_size
        hidden = np.memmap(self.file(split), self.layers.dtype, "r", shape=shape)
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
        shards = self.layers.parallel.shards
        for batch, examples in self.experiment.eval_batches(split, 0, shards):
            hidden = self.layers(batch)
            begins = batch.first.reshape(examples.shape)
            for row, slot in np.argwhere(examples >= 0).tolist():
                start, stop = split.offsets[examples[row, slot] :][:2].tolist()
                begin = begins[row, slot]
                file.seek(start * self._token_size)
                file.write(hidden[row, begin : begin + stop - start].tobytes())
                bar.update()

    @functools.cached_property
    def digest(self) -> Any:
        """The digest of everything that the hidden states depend on besides the texts."""
        # The backend is included because different kinds of devices round differently.
        below = self.layers
        facts: tuple[Any, ...] = _FORMAT, below.config, below.dtype, jax.default_backend()
        if isinstance(self.experiment.architecture, BartConfig):
            facts += (self.experiment.architecture.scale_embedding,)
        digest = hashlib.sha256(repr(facts).encode())
        for path, x in jax.tree.leaves_with_path(self.layers.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(x).data)
        return digest


def as_if_kept(experiment: Experiment, split: TokenizedSplit) -> TokenizedSplit:
    """A split with placeholder hidden states of the right shape, which take no memory."""
    if experiment.config.lower_dropout:
        return split
    zero = np.zeros((), experiment.model().dtype)
    shape = len(split.tokens), experiment.architecture.stacks["encoder"].hidden_size
    return dataclasses.replace(split, hidden=np.broadcast_to(zero, shape))
