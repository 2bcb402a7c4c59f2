"""SAM's embeddings of slices, kept on disk: a frozen encoder runs once a slice."""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.files import atomic_write, sweep
from usam.runtime.processes import is_main, say, world_size

FORMAT = 1  # to be raised where a change of the encoder's code changes what it gives
GB = 10**9
RESERVE = GB  # stays free on the disk, for checkpoints
SUFFIX = ".embedding"
CHECKSUM = 4  # bytes after the values
LOOK_EVERY = 32  # embeddings written between two looks at the folder's size


class EmbeddingCache:
    """Calls `embed` once for each image; later its embedding comes from a file.

    embed: image (1, C, H, W) -> float32 (1, *shape), from frozen weights. folder/`encoder` holds a
    file an image, named after the digest of its values: a slice that is prepared in another way is
    another image. encoder: digest of all else that an embedding depends on, see `encoder_digest`.
    limit: bytes that `folder` may take; what does not fit is computed each time. Images are
    encoded one by one, so that an embedding does not depend on the batch it came in. Files are
    written whole, so several processes may share a folder. A damaged file is replaced.
    Raises ValueError for a folder that cannot be written and a limit below one embedding.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        folder: Path,
        *,
        encoder: str,
        shape: tuple[int, int, int],
        limit: float,
    ) -> None:
        self.embed, self.root, self.folder = embed, folder, folder / encoder
        self.shape, self.limit = shape, limit
        self.size = 4 * prod(shape) + CHECKSUM  # bytes of a file
        self.is_full = False
        self._room, self._written = 0.0, 0
        if limit < self.size:
            raise ValueError(
                f"--cache_size {limit / GB:g} GB does not hold one embedding of "
                f"{self.size / 1e6:.1f} MB; give more"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / "writable") as scratch:
                scratch.touch()
        except OSError as error:
            raise ValueError(
                f"--cache_embeddings {folder}: cannot write there ({error.strerror}); choose "
                "another folder"
            ) from error
        if is_main():
            sweep(self.folder)

    def describe(self, num_slices: int) -> None:
        """Print where embeddings are kept and how many of `num_slices` have room."""
        known = sum(1 for _ in self.folder.glob(f"*{SUFFIX}"))
        fit = known + int(max(self._look(), 0) // self.size)
        say(
            f"SAM's encoder is frozen: embeddings of {num_slices} slices, {self.size / 1e6:.1f} MB "
            f"each, are kept in {self.folder} ({known} are there); training without augmentation"
        )
        if fit < num_slices:
            say(
                f"warning: {fit} of {num_slices} embeddings fit in {self.root} (--cache_size "
                f"{self.limit / GB:g} GB, {RESERVE / GB:g} GB of the disk stay free); the others "
                "are computed in every epoch"
            )

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Embeddings (N, *shape) float32 of images (N, C, H, W), on their device."""
        names = [image_digest(one) + SUFFIX for one in image.cpu()]
        found = [self._read(name) for name in names]
        for place, name in enumerate(names):
            if found[place] is None:
                computed = self.embed(image[place : place + 1])
                found[place] = computed[0].float().permute(1, 2, 0).cpu().contiguous()
                self._write(name, found[place].numpy())
        return torch.stack(found).to(image.device).permute(0, 3, 1, 2)  # channels last

    def _read(self, name: str) -> Tensor | None:
        """The embedding (h, w, C) in a file; None if it is missing, damaged or unreadable."""
        try:
            content = np.fromfile(self.folder / name, dtype=np.uint8)
        except OSError:
            return None
        values, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
        if len(content) != self.size or zlib.crc32(values) != int.from_bytes(checksum, "little"):
            return None
        channels, *grid = self.shape
        return torch.from_numpy(values.view(np.float32)).view(*grid, channels)

    def _write(self, name: str, values: np.ndarray) -> None:
        """Keep an embedding where there is room; a full or failing disk ends that, and is said."""
        if self.is_full:
            return
        if self._written % LOOK_EVERY == 0:
            self._room = self._look()
        self._room -= self.size * world_size()  # others write as well
        self._written += 1
        if self._room < 0:
            self._stop(f"{self.root} has no room for more embeddings (--cache_size)")
            return
        try:
            with atomic_write(self.folder / name) as scratch, scratch.open("wb") as file:
                file.write(values)
                file.write(zlib.crc32(values).to_bytes(CHECKSUM, "little"))
        except OSError as error:
            self._stop(f"{self.folder}: {error.strerror or error}")

    def _look(self) -> float:
        """Bytes that may still be written: of the limit and of the disk."""
        used = sum(path.stat().st_size for path in self.root.glob(f"*/*{SUFFIX}"))
        return min(self.limit - used, shutil.disk_usage(self.root).free - RESERVE)

    def _stop(self, reason: str) -> None:
        self.is_full = True
        print(f"warning: {reason}; the others are computed in every epoch", flush=True)


def image_digest(image: Tensor) -> str:
    """Hex digest of an image's shape and values, of the CPU."""
    digest = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image.numpy()))
    return digest.hexdigest()


def encoder_digest(encoder: nn.Module, *facts: object) -> str:
    """Hex digest of an encoder's names and weights, and of what else its output depends on."""
    digest = hashlib.blake2b(repr((FORMAT, *map(str, facts))).encode(), digest_size=8)
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
