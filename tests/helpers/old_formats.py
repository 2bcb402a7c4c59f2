"""Checkpoints without their megabytes: what a torch file holds, as JSON, and the file made again.

Kept verbatim: every container, key, type, shape, dtype and stride, plain values, integer tensors
and float tensors of up to SMALL numbers. The numbers of larger ones are drawn by their place.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.fill import fill

SMALL = 16  # numbers; larger float tensors are drawn
REPEATED = 1009


def described(content: Any) -> Any:
    """What a torch file holds, as JSON values; raises TypeError for what no checkpoint holds."""
    if isinstance(content, Tensor):
        return tensor_described(content)
    if isinstance(content, argparse.Namespace):
        return {"Namespace": described(vars(content))}
    if type(content) in (dict, OrderedDict):
        items = [[key, described(value)] for key, value in content.items()]
        return {type(content).__name__: items}
    if type(content) in (list, tuple):
        return {type(content).__name__: [described(value) for value in content]}
    if content is None or type(content) in (bool, int, float, str):
        return content
    raise TypeError(f"a {type(content).__name__} in a checkpoint")


def tensor_described(value: Tensor) -> dict[str, Any]:
    """dtype and shape; strides where they are not the usual ones; the numbers where kept."""
    text = {"Tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if not value.is_contiguous():
        text["stride"] = list(value.stride())
    if value.numel() <= SMALL:
        text["numbers"] = value.flatten().tolist()
    elif not value.is_floating_point():
        packed = zlib.compress(value.numpy().tobytes(), 9)
        text["packed"] = base64.b64encode(packed).decode("ascii")
    return text


def rebuilt(text: Any, place: str) -> Any:
    """What `described` made `text` of; larger float tensors hold numbers drawn by `place`."""
    if not isinstance(text, dict):
        return text
    if "Tensor" in text:
        return tensor_rebuilt(text, place)
    ((kind, inside),) = text.items()
    if kind == "Namespace":
        return argparse.Namespace(**rebuilt(inside, place))
    if kind in ("dict", "OrderedDict"):
        pairs = [(key, rebuilt(value, f"{place}/{key}")) for key, value in inside]
        return (dict if kind == "dict" else OrderedDict)(pairs)
    values = [rebuilt(value, f"{place}/{number}") for number, value in enumerate(inside)]
    return values if kind == "list" else tuple(values)


def tensor_rebuilt(text: dict[str, Any], place: str) -> Tensor:
    """The tensor that `tensor_described` described."""
    dtype, shape = getattr(torch, text["Tensor"]), text["shape"]
    if "numbers" in text:
        value = torch.tensor(text["numbers"], dtype=dtype).reshape(shape)
    elif "packed" in text:
        data = bytearray(zlib.decompress(base64.b64decode(text["packed"])))
        value = torch.frombuffer(data, dtype=dtype).reshape(shape)
    else:
        value = torch.from_numpy(drawn(place, tuple(shape))).to(dtype)
    if "stride" in text:
        value = torch.empty_strided(shape, text["stride"], dtype=dtype).copy_(value)
    return value


def drawn(place: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers that fit the place: weights, or AdamW's averages of gradients.

    The averages repeat REPEATED numbers, which is faster; statistics are positive, as BatchNorm's
    variances must be.
    """
    if "/exp_avg" not in place:
        numbers = fill(place, shape)
        return 0.5 + np.square(numbers) if "/statistics/" in place else numbers
    numbers = np.resize(fill(place, (REPEATED,)), shape)
    return np.square(numbers) / 10_000 if place.endswith("_sq") else numbers / 100


def rebuild(description: Path, target: Path) -> dict[str, Any]:
    """Saves the checkpoint of a JSON file to `target` and returns what it holds."""
    content = rebuilt(json.loads(description.read_text(encoding="utf-8")), description.stem)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, target)
    return content


def main(checkpoint: Path, description: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    text = json.dumps(described(content), separators=(",", ":"))
    lines = text.replace('],["', '],\n["').replace(']},["', ']},\n["')
    assert json.loads(lines) == json.loads(text), "a text holds what stands between entries"
    description.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":  # python -m tests.helpers.old_formats last.pth last.json
    main(*map(Path, sys.argv[1:]))
