"""Prefetching: in order, ahead of time, on another thread, and with errors passed on."""

import threading

import pytest

from pals_jax.data.prefetch import prefetch


def test_everything_comes_in_order_and_ahead():
    made, threads = [], set()
    third = threading.Event()

    def make(number: int) -> int:
        made.append(number)
        threads.add(threading.get_ident())
        if number == 2:
            third.set()
        return number * number

    squares = prefetch(make, range(10))
    assert next(squares) == 0
    assert third.wait(5), "two more are made before they are asked for"
    assert list(squares) == [n * n for n in range(1, 10)]
    assert made == list(range(10))
    assert threads.isdisjoint({threading.get_ident()})


def test_an_error_comes_in_its_place():
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("the third")
        return number

    found = prefetch(make, range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(found)


def test_what_is_left_is_not_made():
    made: list[int] = []
    found = prefetch(made.append, range(100))
    next(found)
    found.close()
    assert len(made) < 10
