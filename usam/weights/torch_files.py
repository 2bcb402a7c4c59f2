"""Reads untrusted torch files: runs no code, checks every bit, limits memory to the file's size.

`usam.weights` and `usam.weights3d` read every checkpoint, ours or a stranger's, through here.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 8 << 20  # names and shapes of 2,000 tensors take about 0.5 MB
MAX_DEPTH = 32
OPCODES = re.compile(  # what torch.save writes beside names, calls and the memo
    r"PROTO|MARK|STOP|NONE|NEW(TRUE|FALSE)|BININT[12]?|LONG1|BINFLOAT|BINUNICODE"
    r"|SHORT_BINSTRING|EMPTY_(LIST|TUPLE|DICT|SET)|TUPLE[123]?|(APPEND|SETITEM)S?|BUILD|BINPERSID"
)
SPARE_BYTES = 64 << 20  # a tensor of equal numbers may be stored as one, if it is not a huge one
CHUNK = 1 << 22
# What a pickle may name, and what of it may be called. torch's own list is longer, and some of it
# takes any amount of memory: bytearray(10**11) fits into twenty bytes, UntypedStorage(10**11) too.
CALLED = re.compile(
    r"collections (OrderedDict|Counter)|argparse Namespace|torch (Size|device)"
    r"|torch._utils _rebuild_(tensor_v[23]|parameter)"
)
NAMED = re.compile(
    r"torch(\.storage)? \w+Storage|torch (b?float|u?int|bool|half|double|long|complex)\d*"
)


def read_file(path: Path) -> Any:
    """The content of a torch file, on the CPU; runs no code and allows no object but Namespaces.

    Before torch sees it, the zip's checksums are compared, which torch does not, and what its
    pickle names is looked up. Raises FileNotFoundError, or ValueError in one line for a file that
    is damaged, holds anything else or claims to hold more than its size.
    """
    try:
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_content(content, most_bytes=path.stat().st_size + SPARE_BYTES)
        return content
    except FileNotFoundError:
        raise
    except MemoryError as error:
        raise ValueError(f"{path}: not enough memory to read it") from error
    except Exception as error:  # the readers raise a different type for every kind of damage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or not a plain checkpoint: {reason:.200}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a file without any other content; see `read_file`."""
    content = read_file(path)
    if not is_state_dict(content):
        raise ValueError(f"{path}: expected tensors by name, as in SAM's checkpoints")
    return dict(content)


def is_state_dict(content: object) -> bool:
    """Whether a value read from a file is a mapping of names to tensors and nothing else."""
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def check_archive(path: Path) -> None:
    """Raises ValueError unless the file is a zip as torch.save writes it, sound to the last bit.

    Nothing in it may be compressed, be there twice or differ from its checksum, and its pickle may
    name nothing that could run or grow.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise ValueError("its parts are compressed, which torch never does")
            if len(set(names)) != len(names):
                raise ValueError("it holds two parts of one name")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("its parts claim more bytes than the file has")
            for member in members:
                with archive.open(member) as part:
                    while part.read(CHUNK):  # compares the checksum at the end
                        pass
            pickles = [member for member in members if member.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it holds no data.pkl, or several")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its pickle is over {MAX_PICKLE_BYTES >> 20} MiB")
            check_pickle(archive.read(pickles[0]))
    except zipfile.BadZipFile as error:
        raise ValueError(f"not a whole zip as torch 1.6 and newer save it ({error})") from None


def check_pickle(code: bytes) -> None:
    """Raises UnpicklingError for a pickle that names or calls anything outside CALLED and NAMED.

    Follows the stack as far as names go: a name may reach a call through the memo only.
    """
    stack: list[str | None] = []
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(code):
        pushed = [None] * len(opcode.stack_after)
        if opcode.name == "GLOBAL":
            _allow(argument, CALLED.fullmatch(argument) or NAMED.fullmatch(argument))
            pushed = [argument]
        elif opcode.name in ("REDUCE", "NEWOBJ"):
            called = stack[-2] if len(stack) > 1 else None
            _allow(called or "an unknown object", called and CALLED.fullmatch(called))
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            pushed = [memo.get(argument)]
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else None
            continue
        elif not OPCODES.fullmatch(opcode.name):
            raise pickle.UnpicklingError(
                f"its pickle has a {opcode.name}, which torch never writes"
            )
        _pop(stack, opcode)
        stack += pushed if opcode.name != "MARK" else ["(mark)"]


def _allow(name: str, allowed: object) -> None:
    if not allowed:
        raise pickle.UnpicklingError(f"{name.replace(' ', '.'):.100} is not plain data")


def _pop(stack: list[str | None], opcode: pickletools.OpcodeInfo) -> None:
    """Pop what an opcode takes from the stack; down to the last mark if it needs one."""
    if pickletools.markobject in opcode.stack_before:
        while stack and stack.pop() != "(mark)":
            pass
        extra = opcode.stack_before.index(pickletools.markobject)
    else:
        extra = len(opcode.stack_before)
    del stack[max(0, len(stack) - extra) :]


def check_content(content: object, *, most_bytes: int) -> None:
    """Raises ValueError for tensors that are not plain memory of at most `most_bytes` each.

    A tensor of few bytes may claim any shape through strides of 0, and lists may hold each other.
    """
    for value in leaves(content):
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError("it holds a tensor that is not plain memory")
        if value.numel() * value.element_size() > most_bytes:
            raise ValueError(
                f"a tensor claims {tuple(value.shape)} numbers, more than the file has"
            )


def leaves(content: object) -> Iterator[object]:
    """Every value inside nested mappings, lists, tuples and Namespaces, each container once.

    Raises ValueError where they are nested deeper than MAX_DEPTH.
    """
    waiting, seen = [(content, 0)], set()
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if not isinstance(value, Mapping | list | tuple | set):
            yield value
            continue
        if depth >= MAX_DEPTH:
            raise ValueError(f"it is nested over {MAX_DEPTH} deep")
        if id(value) not in seen:
            seen.add(id(value))
            inside = value.values() if isinstance(value, Mapping) else value
            waiting += [(one, depth + 1) for one in inside]
