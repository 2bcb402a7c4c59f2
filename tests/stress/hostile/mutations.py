"""How files break: cut short, flipped, patched, spliced; and JSON with something else in it.

Every function takes bytes or values and a random.Random and gives a broken copy.
"""

from __future__ import annotations

import copy
import random
import re
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**32 - 1)
HUGE = (2**63 - 1, -(2**63), 2**64 - 1, 2**40, 10**12)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-38, 1e300)
WORDS = (
    *(b"1e999", b"-1", b"NaN", b"Infinity", b"9" * 40, b"9" * 5000, b"null", b'"../../x"'),
    *(b'"/etc/passwd"', b"[" * 2000, b'"a\\u0000b"', b"{}", b"[]", b"1.5", b"\xff\xfe", b"true"),
    *(b'"\\ud800"', b"-0.0", b"1e-999", b'"' + b"x" * 3000 + b'"'),
)
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 1.5, 1e308, 10**30, -(10**30), float("nan")),
    *(float("inf"), "", "x", "../x", "/etc/passwd", "a\0b", "x" * 5000, "1", "nan", [], {}),
    *([[]], [None], [0, 0, 0], [1, 2, 3], [-1, 2, 3], [10**9] * 3, ["a", "b"], {"a": 1}, DEEP),
)


def truncated(data: bytes, draw: random.Random) -> bytes:
    """The first part of the file, possibly nothing."""
    return data[: draw.randrange(len(data))] if data else data


def flipped(data: bytes, draw: random.Random) -> bytes:
    """1 to 16 bits changed."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16)) if data else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def patched(data: bytes, draw: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes, or a float, written anywhere; mostly into the header."""
    changed = bytearray(data) or bytearray(8)
    place = draw.randrange(min(len(changed), draw.choice((64, 400, 400, len(changed)))))
    code = draw.choice("bhiqfd")
    endian = draw.choice("<>")
    if code in "fd":
        value = struct.pack(endian + code, min(draw.choice(FLOATS), 3e38 if code == "f" else 1e308))
    else:
        size = {"b": 1, "h": 2, "i": 4, "q": 8}[code]
        number = draw.choice((*NUMBERS, *HUGE)) % 256**size
        value = number.to_bytes(size, "little" if endian == "<" else "big")
    changed[place : place + len(value)] = value
    return bytes(changed)


def overwritten(data: bytes, draw: random.Random) -> bytes:
    """A stretch of zeros, ones or noise; disks lose whole blocks."""
    changed, length = bytearray(data), draw.choice((1, 4, 64, 512, 4096))
    place = draw.randrange(max(1, len(changed)))
    filling = draw.choice((b"\0" * length, b"\xff" * length, draw.randbytes(length)))
    changed[place : place + length] = filling[: len(changed) - place]
    return bytes(changed)


def rearranged(data: bytes, draw: random.Random) -> bytes:
    """A stretch left out, doubled or moved."""
    first, second = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    part = data[first:second][:8192]
    second = first + len(part)
    way = draw.randrange(3)
    if way == 0:
        return data[:first] + data[second:]
    if way == 1:
        return data[:second] + part + data[second:]
    rest = data[:first] + data[second:]
    place = draw.randrange(len(rest) + 1)
    return rest[:place] + part + rest[place:]


def lengthened(data: bytes, draw: random.Random) -> bytes:
    """Something behind the end or before the beginning."""
    more = draw.choice((b"\0" * 100, draw.randbytes(64), data[:4096]))
    return data + more if draw.random() < 0.7 else more + data


def reworded(data: bytes, draw: random.Random) -> bytes:
    """Some number or quoted text of a text file replaced by another word."""
    found = list(re.finditer(rb'-?\d+(?:\.\d+)?|"[^"]*"', data))
    if not found:
        return data + draw.choice(WORDS)
    match = draw.choice(found)
    return data[: match.start()] + draw.choice(WORDS) + data[match.end() :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(truncated, truncated, flipped, flipped, patched, patched, overwritten, rearranged),
    *(lengthened, reworded),
)


def broken(data: bytes, draw: random.Random) -> bytes:
    """`data` after one or two of the ways in BYTES."""
    for _ in range(draw.choice((1, 1, 2))):
        data = draw.choice(BYTES)(data, draw)
    return data


def replaced(content: Any, draw: random.Random) -> Any:
    """A copy of nested dicts and lists with a value, somewhere, replaced or left out or added."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    for _ in range(draw.choice((1, 1, 1, 2))):
        holder, key = draw.choice(places)
        way = draw.random()
        try:
            if way < 0.15:
                del holder[key]
            elif way < 0.25 and isinstance(holder, list):
                holder.append(draw.choice(VALUES))
            else:
                holder[key] = draw.choice(VALUES)
        except (KeyError, IndexError):  # gone with the first change
            continue
    return content


def _places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found: list[tuple[Any, Any]] = []
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        found.append((content, key))
        if isinstance(value, dict | list):
            found += _places(value)[:200]
    return found
