"""Prefetching: host work done ahead of time, while the devices are busy."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_AHEAD = 2  # items prepared before they are requested


def prefetch(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """Yields `make(number)` for each number in order, computed on another thread.

    An exception in `make` is raised here, in its place in the order.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        ready: deque[Future[T]] = deque()
        try:
            for number in numbers:
                ready.append(pool.submit(make, number))
                if len(ready) > _AHEAD:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            for future in ready:
                future.cancel()
