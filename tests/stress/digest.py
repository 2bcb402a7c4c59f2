"""The one digest of a run's state: equal digests mean runs that cannot be told apart.

Resumed runs under stress compare it with that of a run which was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

PARTS = ("model", "optimizer", "scaler", "rng", "progress", "best")
VOLATILE = ("seconds", "time", "images_per_second")  # of a log line: measured, not computed


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, bytes]]:
    """Every value in nested dicts and lists, with its path, as its type and its exact bytes."""
    if isinstance(state, Mapping):
        for key in sorted(state, key=str):
            yield from leaves(state[key], f"{path}/{key}")
    elif isinstance(state, list | tuple):
        yield path, f"list {len(state)}".encode()
        for number, value in enumerate(state):
            yield from leaves(value, f"{path}/{number}")
    elif isinstance(state, torch.Tensor):
        kind = f"{state.dtype} {tuple(state.shape)} ".encode()
        yield path, kind + state.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(state, float):
        yield path, b"float " + struct.pack("<d", state)
    else:
        yield path, f"{type(state).__name__} {state!r}".encode()


def state_digest(state: Mapping[str, Any], log: str = "") -> str:
    """SHA-256 over weights, optimizer, scaler, RNG, sampler position and best score, and the log.

    state: a checkpoint; raises KeyError where it lacks one of PARTS. log: the text of log.jsonl.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        for path, value in leaves(state[part], part):
            digest.update(f"{path}\0{len(value)}\0".encode() + value)
    for line in log.splitlines():
        kept = {key: value for key, value in json.loads(line).items() if key not in VOLATILE}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def run_digest(folder: Path) -> str:
    """The digest of what a run left in its folder: last.pth and log.jsonl."""
    state = torch.load(folder / "last.pth", map_location="cpu", weights_only=True)
    return state_digest(state, (folder / "log.jsonl").read_text(encoding="utf-8"))


def differences(first: Path, second: Path) -> list[str]:
    """Paths of what differs between the last.pth of two runs, to say where digests part."""
    states = [torch.load(run / "last.pth", weights_only=True) for run in (first, second)]
    found = [dict(pair for part in PARTS for pair in leaves(s[part], part)) for s in states]
    names = sorted(found[0].keys() | found[1].keys())
    return [name for name in names if found[0].get(name) != found[1].get(name)]
