"""Files made to harm: pickles that run code or eat memory, headers that claim what is not there.

Code that runs leaves a canary behind, a file whose path every maker is given.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GIANT = (10**12).to_bytes(6, "little")


class Call:
    """Pickles as a call of `function`: what a hostile pickle is made of."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def _calls(canary: Path) -> list[tuple[bytes, bytes]]:
    """(name as a GLOBAL has it, its one text argument) of functions that would leave the canary."""
    touch = f"touch {canary}".encode()
    code = f"open({str(canary)!r}, 'w').close()".encode()
    return [
        (b"os\nsystem", touch),
        (b"posix\nsystem", touch),
        (b"nt\nsystem", touch),
        (b"subprocess\ngetoutput", touch),
        (b"builtins\neval", code),
        (b"builtins\nexec", code),
        (b"__builtin__\neval", code),
        (b"torch.utils.cpp_extension\nload_inline", code),
        (b"torch._dynamo\nsystem", touch),
        (b"numpy.testing._private.utils\nrunstring", code),
        (b"runpy\nrun_path", str(canary).encode()),
        (b"importlib\nimport_module", b"antigravity"),
        (b"torch.hub\nload_state_dict_from_url", b"http://127.0.0.1:9/x.pth"),
        (b"torch.serialization\nload", str(canary).encode()),
        (b"pathlib\nPath", str(canary).encode()),
    ]


def pickles(canary: Path, draw: random.Random) -> bytes:
    """A pickle that would run code, in one of the ways pickles have."""
    name, argument = draw.choice(_calls(canary))
    module, function = name.split(b"\n")
    text = b"X" + struct.pack("<I", len(argument)) + argument

    def short(word: bytes) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word

    called = draw.choice(
        (
            b"c" + name + b"\n" + text + b"\x85R",  # GLOBAL, REDUCE
            b"(" + text + b"i" + name + b"\n",  # INST
            b"(c" + name + b"\n" + text + b"o",  # OBJ
            short(module) + short(function) + b"\x93" + text + b"\x85R",  # STACK_GLOBAL
            b"c" + name + b"\nq\x630h\x63" + text + b"\x85R",  # through the memo
            b"c" + name + b"\n" + text + b"\x85\x81",  # NEWOBJ
            b"cargparse\nNamespace\n)Rc" + name + b"\n" + text + b"\x85Rb",  # a Namespace's state
            b"ccollections\nOrderedDict\n(c" + name + b"\n" + text + b"\x85RtR",
        )
    )
    key = b"X\x05\x00\x00\x00model"
    return b"\x80" + draw.choice((b"\x02", b"\x04", b"\x05")) + b"}" + key + called + b"s."


def memory_pickles(canary: Path, draw: random.Random) -> bytes:
    """A pickle that would take more memory or time than its bytes justify."""
    number = b"J" + (2**31 - 1).to_bytes(4, "little")
    giant = b"\x8a\x06" + GIANT
    key = b"X\x01\x00\x00\x00a"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%btQ%b(%b%bt(%b%bt\x89ccollections\nOrderedDict\n"
        b")RtR"
    )
    zero, one, large = b"K\x00", b"K\x01", b"J\x00\x00\x01\x00"
    values = (
        b"cbuiltins\nbytearray\n" + number + b"\x85R",
        b"ctorch.storage\nUntypedStorage\n" + giant + b"\x85R",
        b"ctorch\nTensor\n" + giant + b"\x85R",
        b"ctorch\nFloatStorage\n" + giant + b"\x85R",
        tensor % (one, zero, large, large, zero, zero),  # strides of 0
        tensor % (giant, zero, giant, one, one, one),  # a storage larger than its record
        tensor % (one, giant, one, one, one, one),  # an offset far outside
        tensor % (one, zero, giant, giant, giant, giant),
        tensor % (one, zero, b"J\xff\xff\xff\xff", one, one, one),  # a negative size
        b"]" * 50_000 + b"a" * 49_999,  # lists in lists
        b"]q\x01" + b"h\x01h\x01\x86q\x01" * 60,  # each twice in the next
        b"\x8a\xff" + b"\x7f" * 255,  # a large number
        b"cbuiltins\nset\n(" + number * 1000 + b"tR",
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(" + giant * 2
        + b"t(K\x01K\x01t\x89tR",
    )  # fmt: skip
    del canary
    return b"\x80\x02}" + key + draw.choice(values) + b"s."


def npy_headers(canary: Path, draw: random.Random) -> bytes:
    """An npy file with a header that lies, runs code or holds objects."""
    if draw.random() < 0.25:
        stream = io.BytesIO()
        array = np.array([Call(exec, f"open({str(canary)!r}, 'w')")], dtype=object)
        np.lib.format.write_array(stream, array, allow_pickle=True)
        return stream.getvalue()
    shape = draw.choice((
        "(10000000000,)", "(2147483647, 2147483647)", "(-1, 8)", "(8, -8)", "(1e9, 8)", "()",
        "(0, 0)", "(9223372036854775807, 2)", "(8, 8, 8, 8)", "'8'", "(True, 8)", "None",
        "(8, [8])", "(" * 3000 + ")" * 3000, "(8, 8)", "(46341, 46341)", "(4096, 4096)",
        "(65536, 65536, 65536)", f"({'9' * 4000},)",
    ))  # fmt: skip
    descr = draw.choice((
        "'<f8'", "'|u1'", "'|O'", "'<V99999999'", "[('a', '<f8'), ('b', '|O')]", "'<f999'", "None",
        "'|S1000000000'", "'<M8[ns]'", "'<c16'", f"__import__('os').system('touch {canary}')",
        "'<U2147483647'", "'<f2'", "'>i8'", "('<f8', (100000, 100000))",
    ))  # fmt: skip
    order = draw.choice(("False", "True", "2", "''"))
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    version = draw.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    length = draw.choice((len(header), 0, 65535, 2**32 - 1))
    packed = struct.pack("<H", length % 65536) if version[0] == 1 else struct.pack("<I", length)
    return b"\x93NUMPY" + version + packed + header + bytes(draw.choice((0, 64, 512)))


def nifti_headers(good: bytes, draw: random.Random) -> bytes:
    """A NIfTI-1 file with impossible sizes, types, offsets, scales or places."""
    data = bytearray(good)
    fields = {  # offset, format, values
        "dim": (40, "<8h", [
            (3, 32767, 32767, 32767, 1, 1, 1, 1), (7, *[32767] * 7), (0, *[1] * 7),
            (3, -5, 5, 5, 1, 1, 1, 1), (4, 8, 8, 4, 32767, 1, 1, 1), (3, 0, 8, 4, 1, 1, 1, 1),
            (9, *[8] * 7), (2, 8, 8, 1, 1, 1, 1, 1), (5, 8, 8, 4, 1, 30000, 1, 1),
        ]),
        "datatype": (70, "<h", [(n,) for n in (0, 1, 32, 128, 1536, 2048, 2304, 1792, 999, -1)]),
        "bitpix": (72, "<h", [(n,) for n in (0, 1, -8, 32767)]),
        "vox_offset": (108, "<f", [(n,) for n in (-1.0, 0.0, 1e30, float("nan"), 3.5, 351.0)]),
        "slope": (112, "<2f", [(float("nan"), 0.0), (float("inf"), 1.0), (1e38, 1e38), (0.0, 0.0)]),
        "sizeof": (0, "<i", [(n,) for n in (0, 540, -348, 2**31 - 1)]),
        "pixdim": (76, "<8f", [(float("nan"),) * 8, (0.0,) * 8, (-1.0,) * 8, (1e38,) * 8]),
        "codes": (252, "<2h", [(0, 0), (99, 99), (-1, -1), (1, 0)]),
        "sform": (280, "<12f", [(0.0,) * 12, (float("inf"),) * 12, (1e38,) * 12, (1.0,) * 12]),
        "quatern": (256, "<3f", [(9.0, 9.0, 9.0), (float("nan"),) * 3]),
        "magic": (344, "<4s", [(b"ni1\0",), (b"n+2\0",), (b"xxxx",), (b"n+1x",)]),
    }  # fmt: skip
    for name in draw.sample(sorted(fields), draw.choice((1, 1, 2, 3))):
        place, form, values = fields[name]
        struct.pack_into(form, data, place, *draw.choice(values))
    if draw.random() < 0.2:  # an extension that claims to be as long as the file or longer
        size = draw.choice((2**31 - 16, -16, 8, 15, 10**6))
        data[348:352] = b"\1\0\0\0"
        data[352:352] = struct.pack("<2i", size, 6) + bytes(8)
    return bytes(data)


def csv_rows(canary: Path, draw: random.Random) -> bytes:
    """A table whose cells would run, point outside or never end."""
    code = f"__import__('os').system('touch {canary}')"
    row = draw.choice((
        f'case1_slice0,"{code}"', f'case1_slice0,"[{code}, 1, 2, 3]"', f'"{code}","[1, 2, 3, 4]"',
        '../../etc/passwd,"[1, 2, 3, 4]"', '/etc/passwd,"[1, 2, 3, 4]"', 'a\0b,"[1, 2, 3, 4]"',
        'C:\\x,"[1, 2, 3, 4]"', f'case1_slice0,"{"[" * 100000}"', 'case1_slice0,"[1, 2, 3, 4',
        f'case1_slice0,"{"1," * 60000}"', f'case1_slice0,"[{"9" * 5000}, 1, 2, 3]"',
        'case1_slice0,"[1e999, 1, 2, 3]"', 'case1_slice0,"[nan, 1, 2, 3]"', "," * 50000,
        f'{"x" * 200000},"[1, 2, 3, 4]"', 'case1_slice0,"[1, 2, 3, 4]"\r\r\n"', "=1+1,[1 2 3 4]",
        f'case1_slice0,"{" " * 100000}"', f'case1_slice0,"[1,{" " * 50000}x 2, 3, 4]"',
    ))  # fmt: skip
    return b"name,bbox\n" + row.encode() + b"\n" * draw.choice((0, 1, 1000))


def json_texts(canary: Path, draw: random.Random) -> bytes:
    """A text that is no JSON, or JSON that is deep, long or strange."""
    del canary
    return draw.choice((
        b"[" * 200_000, b'{"a":' * 100_000, b"[" * 200_000 + b"]" * 200_000, b"1" * 100_000,
        b'{"points": [[' + b"9" * 6000 + b", 1, 1]]}", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0",
        b'{"points": [[NaN, 1, 1]]}', b'{"points": [[1e400, 1, 1]]}', b"null", b'"text"', b"[]",
        b'{"objects": [' + b'{"points": [[1, 1, 1]]},' * 30_000 + b"{}]}", b"", b"\0" * 1000,
        b'{"labels": {"background": 0, "a": [1, 2]}}', b'{"labels": null, "channel_names": {}}',
        b'{"format": 1, "classes": [], "cases": []}', b'{"format": 1, "classes": 7, "cases": {}}',
        b'{"format": "volumes-1", "classes": [{}, {}], "cases": [[]]}', b'{"scans": {"x": 1}}',
        b'{"\\ud800": "\\udfff"}', b'{"train": 1, "val": null, "test": "x"}',
        b'{"train": [[]], "val": [{}], "test": [1], "folds": [1]}',
    ))  # fmt: skip


def zip_bombs(member: str, draw: random.Random) -> bytes:
    """A zip whose member unpacks to 64 MiB or more than its directory says, or claims 4 GiB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, draw.choice((bytes_of_zeros(), b"\0" * 1000)))
    data = bytearray(stream.getvalue())
    place = data.rfind(b"PK\x01\x02")
    way = draw.randrange(4)
    if way == 0:
        struct.pack_into("<I", data, place + 24, draw.choice((0xFFFFFFFE, 7, 2**31)))
    elif way == 1:
        struct.pack_into("<H", data, place + 10, draw.choice((9, 12, 14, 99)))  # the method
    elif way == 2:
        struct.pack_into("<H", data, place + 8, 1)  # encrypted
    return bytes(data)


@functools.cache
def bytes_of_zeros() -> bytes:
    """64 MiB of zeros, which pack into 64 KiB."""
    return bytes(64 << 20)


def gzip_bombs(header: bytes) -> bytes:
    """A gzip of a NIfTI header and then 64 MiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(header) + packer.compress(bytes_of_zeros()) + packer.flush()
