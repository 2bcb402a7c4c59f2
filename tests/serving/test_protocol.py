"""Packed arrays: the client's own packing is read, and nothing is allocated for a false claim."""

from __future__ import annotations

import struct

import blosc2
import numpy as np
import pytest
from nnInteractive.inference.remote import serialization

from usam.serving.leases import EndedError, FullError, Leases
from usam.serving.model import affine_of, scan_of_array
from usam.serving.protocol import half_open_box, pack_array, read_json, three_numbers, unpack_array

ARRAYS = [
    np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4),
    np.zeros((3, 5, 7), dtype=np.uint8),
    np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 4, 5),
    np.ones((2, 2, 2), dtype=bool),
    np.zeros((2, 3, 5), dtype=np.float16),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_arrays_travel_both_ways_with_the_clients_own_packing(array: np.ndarray) -> None:
    for codec in (blosc2.Codec.ZSTD, blosc2.Codec.LZ4):
        found = unpack_array(serialization.pack_array(array, codec=codec))
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
    assert np.array_equal(serialization.unpack_array(pack_array(array)), array)


def packed(shape: tuple[int, ...], body: bytes, name: bytes = b"uint8", number: int = 1) -> bytes:
    """A packed array with any claims."""
    head = struct.pack("<4sBBBB", b"NNIA", 1, 1, len(shape), len(name)) + name
    return head + struct.pack(f"<{len(shape)}q", *shape) + struct.pack("<I", number) + body


def frame(array: bytes) -> bytes:
    return blosc2.compress2(array, typesize=1)


GOOD = frame(bytes(1000))
BOMB = frame(bytes(64 << 20))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut or damaged"),
        (b"NNIA", "cut or damaged"),
        (b"XXXX" + bytes(40), "not a packed array"),
        (packed((1, 2**40, 1, 1), b""), "at most 2\\^30"),
        (packed((2**20, 2**20, 2**20), b""), "at most 2\\^30"),
        (packed((-1, 5, 5), b""), "at most 2\\^30"),
        (packed((1,) * 9, b""), "9 axes"),
        (packed((5, 5, 5), b"", b"object"), "dtype 'object'"),
        (packed((5, 5, 5), b"", b"complex128"), "dtype 'complex128'"),
        (packed((10, 10, 10), struct.pack("<QQ", 1000, len(GOOD)) + GOOD[:-3]), "is cut"),
        (packed((10, 10, 11), struct.pack("<QQ", 1000, len(GOOD)) + GOOD), "holds 1000 bytes"),
        (packed((10, 10, 10), struct.pack("<QQ", 1000, len(BOMB)) + BOMB), "claims another size"),
        (packed((10, 10, 10), struct.pack("<QQ", 2**40, len(GOOD)) + GOOD), "claims another size"),
        (packed((10, 10, 10), struct.pack("<QQ", 1000, 2**60) + GOOD), "is cut"),
        (packed((10, 10, 10), b"", number=2**31), "at most 64"),
        (packed((10, 10, 10), struct.pack("<QQ", 1000, 999) + bytes(999)), "packed array"),
    ],
)
def test_false_claims_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_array(content)


def test_any_damage_is_a_value_error_or_another_array() -> None:
    whole = serialization.pack_array(np.arange(2000, dtype=np.int16).reshape(10, 10, 20))
    generator = np.random.default_rng(4)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        try:
            unpack_array(bytes(damaged[: generator.integers(1, len(whole) + 1)]))
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_shape_that_is_wanted_is_kept() -> None:
    array = pack_array(np.zeros((2, 3, 4), dtype=np.uint8))
    assert unpack_array(array, (2, None, 4)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="2 x 3 x 4 voxels; expected 2 x 3 x 5"):
        unpack_array(array, (2, 3, 5))


def test_values_of_requests_are_checked() -> None:
    assert half_open_box([[0, 5], [2, 3], [-4, 99]], "box", (5, 6, 7)) == [(0, 5), (2, 3), (0, 7)]
    for value in (None, [[0, 1]], [[0, 0], [0, 1], [0, 1]], [[0, 1.5], [0, 1], [0, 1]],
                  [[9, 10], [0, 1], [0, 1]], [[False, True], [0, 1], [0, 1]]):  # fmt: skip
        with pytest.raises(ValueError, match="^box"):
            half_open_box(value, "box", (5, 6, 7))
    for value in (None, [1, 2], [1, 2, "3"], [1, 2, True], [1, 2, 1e30], [1, 2, float("nan")]):
        with pytest.raises(ValueError, match="^place"):
            three_numbers(value, "place")
    for text in (b"[1]", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match=r"request's JSON|NaN"):
            read_json(text)


def test_an_image_is_placed_by_its_orientation() -> None:
    assert np.array_equal(affine_of("LPS", (1, 2, 3)), np.diag([-1, -2, 3, 1]))
    array = np.zeros((4, 5, 6), dtype=np.float32)
    scan = scan_of_array(array, (3.0, 2.0, 1.0), "RAS")
    assert scan.array.shape == (6, 5, 4)
    assert np.array_equal(scan.affine, np.diag([1, 2, 3, 1]))
    expected = [[0, 0, 3, 0], [0, -2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert np.array_equal(affine_of("SPR", (1, 2, 3)), np.array(expected))
    with pytest.raises(ValueError, match="spacing"):
        affine_of("LPS", (1, 0, 3))
    array[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 voxels are NaN"):
        scan_of_array(array, (3.0, 2.0, 1.0), "RAS")


def test_leases_end_when_idle_or_silent_and_are_counted() -> None:
    now = [0.0]
    leases = Leases(1, idle=100, silent=10, clock=lambda: now[0])
    lease = leases.claim(lambda: "content")
    with pytest.raises(FullError, match="all 1 session of this server"):
        leases.claim(lambda: "other")
    for now[0] in (9, 18, 27):  # heartbeats keep it, but not beyond its idle time
        leases.find(lease.token, is_use=False)
    assert leases.remaining(lease) == 73
    now[0] = 38
    with pytest.raises(EndedError):
        leases.find(lease.token)
    second = leases.claim(lambda: "next")
    for now[0] in range(40, 150, 9):
        try:
            leases.find(second.token, is_use=False)
        except EndedError:
            break
    assert now[0] > 138
    leases.release(second.token)
    leases.release("unknown")
