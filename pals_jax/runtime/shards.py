"""How the rows of a batch are divided among the devices of all hosts."""

from typing import NamedTuple

import numpy as np


class Shards(NamedTuple):
    """The equal parts, one per device, into which the rows of every batch are divided.

    Attributes:
        total: S, the number of shards on all hosts.
        first: the index of this host's first shard.
        local: s, the number of shards on this host.
    """

    total: int = 1
    first: int = 0
    local: int = 1

    def mine(self, rows: int) -> slice:
        """The slice of this host's rows among all rows."""
        each = rows // self.total
        return slice(self.first * each, (self.first + self.local) * each)

    def split(self, x: np.ndarray) -> np.ndarray:
        """This host's rows [s * r, ...] as [s, r, ...]."""
        return x.reshape(self.local, -1, *x.shape[1:])
