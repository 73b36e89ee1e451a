"""How the rows of a batch are divided among the devices of all hosts."""

from typing import NamedTuple

import numpy as np


class Shards(NamedTuple):
    """The equal parts that the rows of every batch are divided into, one for each device.

    Attributes:
        total: S, their number on all hosts.
        first: the first one of this host.
        local: s, how many of them this host makes.
    """

    total: int = 1
    first: int = 0
    local: int = 1

    def mine(self, rows: int) -> slice:
        """Which of all rows are this host's."""
        each = rows // self.total
        return slice(self.first * each, (self.first + self.local) * each)

    def split(self, x: np.ndarray) -> np.ndarray:
        """This host's rows [s * r, ...] as [s, r, ...]."""
        return x.reshape(self.local, -1, *x.shape[1:])
