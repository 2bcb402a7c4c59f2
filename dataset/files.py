"""Atomic writing of files, locks on folders, and digests of content."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SCRATCH = ".tmp-"  # names of unfinished files begin with it
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
OLD = 24 * 3600  # seconds; younger unfinished files stay where the file system has no locks
BLOCK = 1 << 20  # bytes
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2: swaps two names in one step


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path`, to be written in the block; then it becomes `path`.

    It ends in the same suffixes. Bytes and name are on the disk when the block ends; after an error
    the old file is left as it was and the temporary one is removed. OSError names `path`.
    """
    path = Path(path)
    scratch = path.with_name(f"{SCRATCH}{os.getpid()}-{path.name[-60:]}")
    try:
        handle, _ = _lock(scratch, wait=True)  # held, so that `sweep` leaves it alone
        try:
            yield scratch
            sync(scratch)
            os.replace(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        sync(path.parent)
    except OSError as error:
        if error.filename == str(scratch):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_write(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)


def write_json(
    path: Path | str, content: Any, indent: int | None = 1, *, sort_keys: bool = True
) -> None:
    """Writes JSON atomically; ValueError for NaN and infinities."""
    text = json.dumps(content, indent=indent, sort_keys=sort_keys, allow_nan=False)
    write_text(path, text + "\n")


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Removes unfinished files that killed processes left in a folder."""
    for path in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):  # in use, gone already, or not ours to remove
            handle, held = _lock(path, wait=False)
            if held or time.time() - path.stat().st_mtime > OLD:
                path.unlink()
            os.close(handle)


@contextlib.contextmanager
def locked(
    folder: Path | str, purpose: str, *, wait: bool = False, at: Path | None = None
) -> Iterator[None]:
    """Locks a folder against other processes; it is created if needed.

    purpose: what this process does there, "training" for example. at: where the lock lies if not
    in the folder itself. The kernel releases the lock when the process ends, however that happens.
    Raises ValueError naming the process that has the lock, or waits for it. Where the file system
    has no locks a warning is printed and the block runs.
    """
    path = Path(at or folder) / LOCK
    handle, held = _lock_or_refuse(path, Path(folder), wait)
    if not held:
        print(f"warning: {folder}: no file locks here; run one process at a time", flush=True)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {os.uname().nodename} ({purpose})".encode())
        _handles.add(handle)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        _handles.discard(handle)
        os.close(handle)


def _lock_or_refuse(path: Path, folder: Path, wait: bool) -> tuple[int, bool]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _lock(path, wait=False)
        except FileNotFoundError:  # the folder of the lock was removed by its last owner
            continue
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError):
                holder = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
                holder = holder or "another process"
                if not wait:
                    raise ValueError(
                        f"{folder} is in use by {holder}; wait until it ends, or choose another"
                        " folder"
                    ) from None
                print(f"{folder}: waiting for {holder}", flush=True)
                return _lock(path, wait=True)


@contextlib.contextmanager
def rebuilt(
    folder: Path | str, purpose: str, *, keep: bool = False, wait: bool = False
) -> Iterator[Path]:
    """Context manager: a new folder that replaces `folder` when the block ends.

    It lies beside `folder`, which stays as it is until then, or for good after an error, a kill or
    a block that wrote nothing. keep: what such a block wrote is there the next time. A second
    process is refused, or waits, see `locked`. Raises OSError where it cannot be made.
    """
    folder = Path(os.path.realpath(folder))
    space = folder.with_name(f".{folder.name}.next")
    new, old = space / "new", space / "old"
    closed = folder.parent.exists() and not os.access(folder.parent, os.W_OK)
    if closed or os.path.ismount(folder):
        raise OSError(f"{folder}: {folder.parent} must be writable; choose a folder deeper inside")
    with contextlib.ExitStack() as ends:
        ends.callback(_remove_empty, space)
        ends.enter_context(locked(folder, purpose, wait=wait, at=space))
        ends.callback(_remove_empty if keep else _discard, new)
        if old.exists() and not folder.exists():  # killed between two renames
            os.replace(old, folder)
        _discard(old, *([] if keep else [new]))
        new.mkdir(exist_ok=True)
        yield new
        if any(new.iterdir()):
            sync(new)
            _take_place(new, folder, old)
            sync(folder.parent)
        _discard(old)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _discard(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _take_place(new: Path, folder: Path, old: Path) -> None:
    """Renames `new` to `folder`, whose content is then in `old`; atomically if the system can."""
    if not folder.exists():
        os.rename(new, folder)
        return
    with contextlib.suppress(AttributeError):  # no such function: not Linux
        libc = ctypes.CDLL(None, use_errno=True)
        if not libc.renameat2(AT_FDCWD, bytes(new), AT_FDCWD, bytes(folder), RENAME_EXCHANGE):
            os.rename(new, old)
            return
    os.rename(folder, old)
    os.rename(new, folder)


_handles: set[int] = set()  # of the locks held by `locked`


def _release_in_child() -> None:
    """Closes a parent's locks in a forked child, which may outlive the parent."""
    while _handles:
        os.close(_handles.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _lock(path: Path, *, wait: bool) -> tuple[int, bool]:
    """(open descriptor of the file, whether it is locked); the file is created if needed.

    Raises BlockingIOError if another process has the lock and `wait` is False.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                return handle, False
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):  # removed by its last owner: make another
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle, True
        except OSError as error:
            if error.errno in NO_LOCKS:
                return handle, False
            os.close(handle)
            raise
        os.close(handle)


def file_digest(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def blocks(path: Path | str) -> Iterator[bytes]:
    """The bytes of a file, in chunks."""
    with Path(path).open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def array_digest(array: np.ndarray) -> str:
    """Hex digest of an array's shape and values; not of its dtype and its order in memory."""
    digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
    for part in array if array.ndim > 1 else [array]:
        digest.update(np.ascontiguousarray(part).view(np.uint8))
    return digest.hexdigest()
