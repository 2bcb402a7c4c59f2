"""Tensors by name from any weight file: torch or safetensors, in a wrapper or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from usam.weights.torch_files import is_state_dict, read_file

WRAPPERS = ("model_state_dict", "state_dict", "model")  # what other programs put tensors under
PARALLEL = "module."  # what DataParallel puts before each name
OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # how torch before 1.6 starts a file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name in a weight file, on the CPU, without wrapper and without `module.`.

    What the file is, is read from its first bytes, not from its name. Raises FileNotFoundError,
    or ValueError in one line for a file that is damaged or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    content = _read(path)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not is_state_dict(content) or not content:
        raise ValueError(f"{path} holds no tensors by name; expected a model's weights")
    return {name.removeprefix(PARALLEL): value for name, value in content.items()}


def _read(path: Path) -> object:
    with path.open("rb") as file:
        start = file.read(len(OLD_TORCH))
    if start == OLD_TORCH:
        raise ValueError(
            f"{path} was saved by torch before 1.6; load it and save it again with a newer torch"
        )
    if start[8:9] != b"{":
        return read_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
