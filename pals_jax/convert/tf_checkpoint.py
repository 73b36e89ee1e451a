"""TensorFlow checkpoints ("tensor bundles") without TensorFlow.

`PREFIX.index` is a sorted table in LevelDB's format. It maps each variable's name to a protocol
buffer with the location of its raw values in `PREFIX.data-00000-of-00001`. See tensor_bundle.proto
and lib/io/format.cc in TensorFlow's sources.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pals_jax.runtime.errors import UserError

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48  # bytes, including the magic number
_BLOCK_TRAILER = 5  # bytes after each block: compression type and checksum

# TensorFlow's DataType.
_DTYPES: dict[int, Any] = {
    **{1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?"},
    **{14: jnp.bfloat16, 17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8"},
}


def read_tf_checkpoint(prefix: str | Path) -> dict[str, np.ndarray]:
    """The variables of a checkpoint, by name.

    Args:
        prefix: the path of the files without `.index`, for example `.../bert_model.ckpt`.

    Returns:
        Arrays of the stored dtypes, memory-mapped and read-only.

    Raises:
        UserError: if files are missing or truncated, or hold anything but arrays of numbers.
    """
    path = Path(f"{prefix}.index")
    try:
        entries = dict(_table(path.read_bytes()))
        header = _message(entries.pop(b""))
        if header.get(2, [0]) != [0]:
            raise ValueError("it was written on a big-endian machine")
        shards = header.get(1, [1])[0]
        files = (f"{prefix}.data-{i:05d}-of-{shards:05d}" for i in range(shards))
        data = [np.memmap(file, np.uint8, "r") for file in files]
        return {name.decode(): _array(_message(entry), data) for name, entry in entries.items()}
    except OSError as error:
        raise UserError(f"cannot read the TensorFlow checkpoint {prefix}: {error}.") from error
    except (ValueError, LookupError, TypeError) as error:  # damaged bytes can fail anywhere
        raise UserError(
            f"the TensorFlow checkpoint {prefix} is damaged or in another format ({error});"
            " get its .index and .data files again."
        ) from error


def _table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of all blocks; the table's last block lists the others."""
    if table[-8:] != _MAGIC:
        raise ValueError("the index lacks its magic number")
    _, _, offset, size = _varints(table, len(table) - _FOOTER, 4)[0]
    for _, place in _block(table, offset, size):
        yield from _block(table, *_varints(place, 0, 2)[0])


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """A block's keys and values; each key stores the length of the prefix shared with the last."""
    block = table[offset : offset + size]
    if offset + size + _BLOCK_TRAILER + _FOOTER > len(table):
        raise ValueError("the index is cut short")
    if table[offset + size]:
        raise ValueError("its index is compressed")  # TensorFlow itself never compresses it
    restarts = int.from_bytes(block[-4:], "little")
    position, end, key = 0, size - 4 * (restarts + 1), b""
    while position < end:
        (common, rest, length), position = _varints(block, position, 3)
        key = key[:common] + block[position : position + rest]
        position += rest + length
        yield key, block[position - length : position]
    if position != end:
        raise ValueError("the index is cut short")


def _array(entry: dict[int, list[Any]], data: Sequence[np.ndarray]) -> np.ndarray:
    """The array that a BundleEntryProto points to."""
    dtype, shard, offset, size = (entry.get(field, [0])[0] for field in (1, 3, 4, 5))
    if dtype not in _DTYPES or 7 in entry:
        raise ValueError("it holds strings, resources or variables in parts")
    numbers = np.dtype(_DTYPES[dtype])
    dims = _message(entry[2][0]).get(2, []) if 2 in entry else []
    shape = tuple(_message(dim).get(1, [0])[0] for dim in dims)
    values = data[shard][offset : offset + size]
    if len(values) != size or size != math.prod(shape) * numbers.itemsize:
        raise ValueError("its data are cut short")
    return values.view(numbers).reshape(shape)


def _message(message: bytes) -> dict[int, list[Any]]:
    """The values of each field of a protocol buffer, as numbers or bytes."""
    fields: dict[int, list[Any]] = {}
    position = 0
    while position < len(message):
        (tag,), position = _varints(message, position, 1)
        field, kind = tag >> 3, tag & 7
        if kind in (0, 2):
            (value,), position = _varints(message, position, 1)
        size = {0: 0, 1: 8, 5: 4}.get(kind, value if kind == 2 else -1)
        if size < 0 or position + size > len(message):
            raise ValueError("an entry of the index is cut short")
        fields.setdefault(field, []).append(
            value if kind == 0 else message[position : position + size]
        )
        position += size
    return fields


def _varints(buffer: bytes, position: int, count: int) -> tuple[list[int], int]:
    """Decodes `count` varints (7 bits per byte, low bits first); also returns the end position."""
    numbers = []
    for _ in range(count):
        number, shift = 0, 0
        while buffer[position] & 128:
            number |= (buffer[position] & 127) << shift
            position, shift = position + 1, shift + 7
        numbers.append(number | buffer[position] << shift)
        position += 1
    return numbers, position
