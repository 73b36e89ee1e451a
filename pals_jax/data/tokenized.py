"""The tokens of the examples of one split, in memory or on disk."""

import dataclasses
from pathlib import Path
from typing import Any, Self

import numpy as np

_FILES = ("tokens", "offsets", "first", "targets")
_TARGET_FILES = ("tokens", "offsets")


@dataclasses.dataclass(frozen=True)
class TokenizedTargets:
    """The target texts of N examples, each behind the token that its decoder starts with.

    Attributes:
        tokens: int32 [sum of (1 + lengths)], all end to end.
        offsets: int64 [N + 1]; target i and its start are `tokens[offsets[i] : offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens per target, special tokens included, the start token not."""
        return np.diff(self.offsets) - 1


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """N examples, each as `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` or its like.

    The arrays are memory-mapped when they come from the cache.

    Attributes:
        tokens: int32 [sum of lengths], all examples end to end.
        offsets: int64 [N + 1]; example i is `tokens[offsets[i] : offsets[i + 1]]`.
        first: int32 [N], the number of leading tokens of type 0; those after them are of type 1.
        targets: float32 [N], class ids or rescaled regression labels; NaN where unlabelled or
            where the targets are texts.
        hidden: [sum of lengths, D], each token's cached hidden state below the first adapter
            (`pals_jax.inference.hidden_cache`). None: computed at every step.
        target_texts: the targets that are texts. None: there are none.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    first: np.ndarray
    targets: np.ndarray
    hidden: np.ndarray | None = None
    target_texts: TokenizedTargets | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.first)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens per example, special tokens included."""
        return np.diff(self.offsets)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N]: the lengths; with target texts [N, 2]: those of sources and of targets."""
        if self.target_texts is None:
            return self.lengths
        return np.stack([self.lengths, self.target_texts.lengths], axis=1)

    def alone(self, i: int) -> Self:
        """Example i, without its target text, as a split of its own."""
        begin, end = self.offsets[i : i + 2]
        one = slice(i, i + 1)
        hidden = None if self.hidden is None else self.hidden[begin:end]
        offsets = np.array([0, end - begin])
        return type(self)(
            self.tokens[begin:end], offsets, self.first[one], self.targets[one], hidden
        )

    def save(self, directory: Path) -> None:
        """Writes one `.npy` file per array into a new directory."""
        directory.mkdir()
        for name in _FILES:
            np.save(directory / f"{name}.npy", getattr(self, name))
        if self.target_texts is not None:
            for name in _TARGET_FILES:
                np.save(directory / f"target_{name}.npy", getattr(self.target_texts, name))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Memory-maps the files that `save` wrote."""

        def read(name: str) -> Any:
            return np.load(directory / f"{name}.npy", mmap_mode="r")

        split = cls(*map(read, _FILES))
        if not (directory / f"target_{_TARGET_FILES[0]}.npy").exists():
            return split
        texts = TokenizedTargets(*(read(f"target_{name}") for name in _TARGET_FILES))
        return dataclasses.replace(split, target_texts=texts)
