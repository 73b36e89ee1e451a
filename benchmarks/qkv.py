"""The speed of computing queries, keys and values in three matrix products, or in one.

    python benchmarks/qkv.py

Checkpoints, adapters and optimisers have three kernels, so a single product must concatenate them
first. 1,152 positions, float32; the two take turns. Prints one JSON line: for each width and pass,
the median over rounds of the time of one product divided by the time of three.
"""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tqdm import tqdm

WIDTHS, POSITIONS, ROUNDS = (384, 768), 1152, 101


def three(x: Array, kernels: list[Array]) -> list[Array]:
    """[L, D] and three [D, D] -> three [L, D]."""
    return [x @ kernel for kernel in kernels]


def one(x: Array, kernels: list[Array]) -> list[Array]:
    """The same in one product, with the kernels concatenated."""
    return jnp.split(x @ jnp.concatenate(kernels, axis=1), 3, axis=1)


def backward(project: Any) -> Any:
    """The gradients of the outputs' sum of squares with respect to both arguments."""

    def loss(x: Array, kernels: list[Array]) -> Array:
        return sum((jnp.sum(jnp.square(y)) for y in project(x, kernels)), jnp.zeros(())) / POSITIONS

    return jax.grad(loss, argnums=(0, 1))


def main() -> None:
    """Times them on the default device."""
    cases = {
        f"{width}, {name}": (width, jax.jit(change(one)), jax.jit(change(three)))
        for width in WIDTHS
        for name, change in {"forward": lambda f: f, "forward and backward": backward}.items()
    }
    ratios: dict[str, float] = {}
    for name, (width, *both) in tqdm(cases.items(), unit="case"):
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (POSITIONS, width))
        kernels = [jax.random.normal(key, (width, width)) / width for key in keys[1:]]
        found = [_seconds(f, x, kernels) for _ in range(ROUNDS) for f in both][2:]  # compiles first
        ratios[name] = statistics.median(
            a / b for a, b in zip(found[::2], found[1::2], strict=True)
        )
    print(json.dumps({"one_over_three": ratios}))


def _seconds(f: Any, x: Array, kernels: list[Array]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(f(x, kernels))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
