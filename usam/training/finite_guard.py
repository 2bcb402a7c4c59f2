"""Steps whose gradients are not finite are left out, without a wait for the device.

The engine checks every step through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SKIPPED_STEPS = 20  # steps in a row without a finite gradient, after which training stops


class FiniteGuard:
    """Leaves out steps whose gradients are not finite, without asking the device each time.

    The gradients of all one-dimensional parameters are summed up: a NaN or Inf anywhere in a
    loss reaches them, and after the all-reduce it reaches them on every rank. In float16 the
    scaled gradients of single weights overflow, too, so there all of them are (`every`). The fused
    optimizer reads the verdict on the device and leaves weights and state as they are.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, *, every: bool = False, in_a_row: int = 0
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self._watched = [p for p in trained if every or p.ndim == 1]
        self._statistics = [b for b in model.buffers() if b.is_floating_point()]
        self.at_start = [buffer.clone() for buffer in self._statistics]
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.full((), float(in_a_row), device=device)

    def restore(self, skipped: int, at_start: Sequence[Tensor]) -> None:
        """Go on within an epoch: the steps left out so far and the statistics of its start."""
        self.skipped += skipped
        for buffer, saved in zip(self.at_start, at_start, strict=True):
            buffer.copy_(saved)

    def check(self, optimizer: torch.optim.Optimizer, norm: Tensor | None = None) -> None:
        """Tell `optimizer` whether the gradients at hand, of this `norm` if known, are fit."""
        if norm is None:
            norms = torch._foreach_norm([p.grad for p in self._watched if p.grad is not None])
            norm = torch.stack(norms).sum()
        bad = (~torch.isfinite(norm)).float()
        optimizer.found_inf = bad
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad

    def mend_statistics(self) -> None:
        """Where a NaN went through BatchNorm, give back the statistics of the epoch's start."""
        for buffer, start in zip(self._statistics, self.at_start, strict=True):
            buffer.copy_(torch.where(buffer.isfinite().all(), buffer, start))

    def raise_if_stuck(self) -> None:
        """Raise ValueError once too many steps in a row were left out; waits for the device."""
        if int(self.in_a_row) >= SKIPPED_STEPS:
            raise ValueError(
                f"{SKIPPED_STEPS} steps in a row had no finite gradient; lower --lr, try "
                "--amp off or check the data with python -m dataset.verify"
            )
