"""What a power cut may leave of a folder: names and bytes that were never synced are lost.

A kill leaves the page cache alone, so kills say nothing about fsync; this model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.stress.injector import Operation

Names = dict[str, "Inode"]
UNSYNCED: tuple[Callable[[bytes, bytes], bytes], ...] = (  # what becomes of (synced, written)
    lambda synced, written: synced,
    lambda synced, written: written[: len(written) // 2],
    lambda synced, written: bytes(len(written)),
    lambda synced, written: written,
)


@dataclass(eq=False)
class Inode:
    """A file's bytes: as written so far, and as they were when it was last synced."""

    written: bytes = b""
    synced: bytes = b""


def disks(
    before: dict[str, bytes], journal: Sequence[Operation], folder: Path
) -> Iterator[dict[str, bytes]]:
    """Every folder, by file name, that a power cut after `journal` may leave of `before`.

    Bytes reach the disk for certain with the file's fsync, names with the folder's; before that
    any of the renames may have happened, in their order, and any of UNSYNCED to the bytes.
    """
    start = {name: Inode(content, content) for name, content in before.items()}
    steps: list[Names] = [dict(start)]  # the names after each change since the last folder fsync
    for operation in journal:
        names, name = dict(steps[-1]), Path(operation.path).name
        if operation.name == "open":
            names[name] = Inode()
            steps.append(names)
        elif operation.name == "write":
            names[name].written += operation.data
        elif operation.name == "fsync" and Path(operation.path) == folder:
            steps = [names]
        elif operation.name == "fsync":
            names[name].synced = names[name].written
        elif operation.name in ("replace", "rename"):
            names[Path(operation.other).name] = names.pop(name)
            steps.append(names)
        elif operation.name == "link":
            names[Path(operation.other).name] = names[name]
            steps.append(names)
        else:  # unlink and remove
            names.pop(name, None)
            steps.append(names)
    for names in steps:
        for fate in UNSYNCED:
            yield {
                name: inode.written
                if inode.written == inode.synced
                else fate(inode.synced, inode.written)
                for name, inode in names.items()
            }
