"""Arrays as nnInteractive's remote protocol v2 packs them, and the values of its requests.

Layout: `NNIA`, version 1, codec (1 ZSTD, 2 LZ4), number of axes, length of the dtype's name (one
byte each), the name, the axes' lengths (int64), the number of chunks (uint32), then for each chunk
its raw and its packed length (uint64) and a blosc2 frame; little endian. Everything that a packed
array claims is checked before memory is taken for it.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import blosc2
import numpy as np

from dataset.text import counted

MAGIC, VERSION = b"NNIA", 1
CODECS = {1: blosc2.Codec.ZSTD, 2: blosc2.Codec.LZ4}
DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64"),
)
MAX_VOXELS = 2**30
MAX_AXES = 4
MAX_CHUNK = 1 << 30  # bytes, raw
MAX_CHUNKS = 64

# Paths of the protocol; those without a lease first.
HEALTH, CLAIM, CAPABILITIES, RELEASE = "/healthz", "/claim", "/capabilities", "/release"
HEARTBEAT, LEASE_STATUS = "/heartbeat", "/lease_status"
META, LEASE = "X-Meta", "X-Lease-Token"


def pack_array(array: np.ndarray) -> bytes:
    """An array as the protocol sends it."""
    array = np.ascontiguousarray(array)
    name = array.dtype.name.encode("ascii")
    raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    starts = range(0, len(raw), MAX_CHUNK)
    head = struct.pack("<4sBBBB", MAGIC, VERSION, 1, array.ndim, len(name)) + name
    parts = [head, struct.pack(f"<{array.ndim}q", *array.shape), struct.pack("<I", len(starts))]
    for start in starts:
        chunk = raw[start : start + MAX_CHUNK]
        packed = blosc2.compress2(
            chunk, typesize=array.dtype.itemsize, codec=CODECS[1], clevel=3,
            filters=[blosc2.Filter.SHUFFLE],
        )  # fmt: skip
        parts += [struct.pack("<QQ", len(chunk), len(packed)), packed]
    return b"".join(parts)


def unpack_array(packed: bytes, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """The array of `pack_array`, or of the protocol's client.

    shape: the one it must have, None for an axis of any length. Raises ValueError, with one line,
    for anything that is cut, claims more than it holds, has another shape or an unknown dtype,
    before memory for it is taken.
    """
    try:
        return _unpacked(memoryview(packed), shape)
    except (struct.error, UnicodeDecodeError):
        raise ValueError("the packed array is cut or damaged") from None
    except RuntimeError as error:  # blosc2's own
        raise ValueError(f"the packed array is damaged: {str(error)[:100]}") from None


def _unpacked(packed: memoryview, shape: tuple[int | None, ...] | None) -> np.ndarray:
    magic, version, codec, num_axes, length = struct.unpack_from("<4sBBBB", packed, 0)
    if magic != MAGIC or version != VERSION or codec not in CODECS:
        raise ValueError("not a packed array of protocol version 2")
    if not 1 <= num_axes <= MAX_AXES:
        raise ValueError(f"a packed array of {num_axes} axes; expected 1 to {MAX_AXES}")
    name = bytes(packed[8 : 8 + length]).decode("ascii")
    if name not in DTYPES:
        raise ValueError(f"a packed array of dtype {name!r:.40}; expected {', '.join(DTYPES)}")
    found = struct.unpack_from(f"<{num_axes}q", packed, 8 + length)
    dtype, offset = np.dtype(name).newbyteorder("<"), 8 + length + 8 * num_axes
    if min(found) < 1 or math.prod(found) > MAX_VOXELS:
        raise ValueError(f"a packed array of {listed(found)} voxels; at most 2^30 are taken")
    if shape is not None and not fits(found, shape):
        raise ValueError(f"an array of {listed(found)} voxels; expected {listed(shape)}")
    chunks = _chunks(packed, offset, math.prod(found) * dtype.itemsize, dtype.itemsize)
    out = np.empty(math.prod(found), dtype=dtype)
    raw, start = out.view(np.uint8), 0
    for chunk, size in chunks:
        written = blosc2.decompress2(chunk, dst=raw[start : start + size])
        if isinstance(written, int) and written not in (0, size):
            raise ValueError("the packed array is damaged: a part is too short")
        start += size
    return out.reshape(found).astype(np.dtype(name), copy=False)


def _chunks(packed: memoryview, offset: int, total: int, item: int) -> list[tuple[Any, int]]:
    """(frame, raw bytes) of every chunk, checked against each other, the frames and `total`."""
    (number,) = struct.unpack_from("<I", packed, offset)
    if number > MAX_CHUNKS:
        raise ValueError(f"a packed array of {counted(number, 'part')}; at most {MAX_CHUNKS}")
    offset, chunks, claimed = offset + 4, [], 0
    for _ in range(number):
        size, length = struct.unpack_from("<QQ", packed, offset)
        offset += 16
        chunk = packed[offset : offset + length]
        if len(chunk) != length or length < 32:
            raise ValueError("the packed array is cut")
        raw, held, _ = blosc2.get_cbuffer_sizes(chunk)
        if raw != size or held != length or size > MAX_CHUNK or size % item:
            raise ValueError("the packed array claims another size than its parts have")
        chunks.append((chunk, size))
        offset, claimed = offset + length, claimed + size
    if claimed != total or offset != len(packed):
        raise ValueError(f"the packed array holds {claimed} bytes; its shape needs {total}")
    return chunks


def fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    """Whether a shape is the expected one, in which None stands for any length."""
    return len(found) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(found, shape, strict=True)
    )


def listed(shape: tuple[int | None, ...]) -> str:
    """A shape as text."""
    return " x ".join("any" if size is None else str(size) for size in shape)


# ------------------------------------------------------------------ values of requests


def read_json(text: bytes | str) -> dict[str, Any]:
    """A request's JSON object, empty for an empty text; ValueError for anything else."""
    if not text:
        return {}
    try:
        content = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ValueError("the request's JSON cannot be read") from None
    if not isinstance(content, dict):
        raise ValueError("the request's JSON must be an object")
    return content


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def flag(content: dict[str, Any], name: str, default: bool) -> bool:
    """A value that must be true or false."""
    value = content.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, found {value!r:.40}")
    return value


def three_numbers(value: Any, name: str) -> tuple[float, float, float]:
    """Three finite numbers."""
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{name}: expected three numbers, found {value!r:.60}")
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in value):
        raise ValueError(f"{name}: expected three numbers, found {value!r:.60}")
    if not all(abs(one) < 2**31 for one in value):
        raise ValueError(f"{name}: numbers out of range, found {value!r:.60}")
    return tuple(value)


def half_open_box(value: Any, name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """[[low, high), ...] along three axes, at least one voxel each, clipped to the scan."""
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{name}: expected [[low, high], ...] of three axes, found {value!r:.60}")
    spans = []
    for pair, size in zip(value, shape, strict=True):
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or any(type(one) is not int for one in pair):
            raise ValueError(f"{name}: expected two whole numbers an axis, found {pair!r:.60}")
        low, high = max(pair[0], 0), min(pair[1], size)
        if low >= high:
            raise ValueError(f"{name}: {pair} holds no voxel of the scan, which has {size}")
        spans.append((low, high))
    return spans
