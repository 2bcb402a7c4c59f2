"""Automatic mixed precision: which type a forward pass computes in on which device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Automatic mixed precision: which device, which type; float32 throughout if dtype is None."""

    device: torch.device
    dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager:
        """The context to run a forward pass in."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def __str__(self) -> str:
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, enabled only for float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def select_precision(amp: str, device: torch.device) -> Precision:
    """The precision that `--amp` names; "auto" is the fastest that trains well on `device`.

    bfloat16 on GPUs and CPUs that compute in it, float16 on older GPUs, float32 elsewhere.
    """
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif device.type == "cpu":
            has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            amp = "bf16" if has_bf16 else "off"
        else:
            amp = "off"
    return Precision(device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp])
