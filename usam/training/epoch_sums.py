"""Counts of an epoch kept on the device: losses, skipped steps, unreadable samples.

A checkpoint saved within an epoch holds these counts, so that the resumed epoch ends with the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usam.runtime.processes import gather, rank, world_size

MAX_SKIPPED_STEPS = 20  # consecutive steps without a finite gradient, after which training stops


class FiniteGuard:
    """Skips steps whose gradients are not finite, without waiting for the device each time.

    The gradients of all one-dimensional parameters are summed: a NaN or Inf anywhere in a loss
    reaches them, and after the all-reduce it reaches them on every rank. In float16 the scaled
    gradients of single weights overflow as well, so all of them are summed there (`every`). The
    fused optimizer reads the result on the device and leaves weights and its state unchanged.
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
        """Continue an epoch: its skipped steps so far and the BatchNorm statistics at its start."""
        self.skipped += skipped
        for buffer, saved in zip(self.at_start, at_start, strict=True):
            buffer.copy_(saved)

    def check(self, optimizer: torch.optim.Optimizer, norm: Tensor | None = None) -> None:
        """Let `optimizer` skip its next step if the gradients, of this `norm`, are not finite.

        norm: computed here where it is None.
        """
        if norm is None:
            norms = torch._foreach_norm([p.grad for p in self._watched if p.grad is not None])
            norm = torch.stack(norms).sum()
        bad = (~torch.isfinite(norm)).float()
        optimizer.found_inf = bad
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad

    def repair_statistics(self) -> None:
        """Where a NaN reached BatchNorm's statistics, restore those of the epoch's start."""
        for buffer, start in zip(self._statistics, self.at_start, strict=True):
            buffer.copy_(torch.where(buffer.isfinite().all(), buffer, start))

    def raise_if_stuck(self) -> None:
        """Raise ValueError after too many skipped steps in a row; waits for the device."""
        if int(self.in_a_row) >= MAX_SKIPPED_STEPS:
            raise ValueError(
                f"{MAX_SKIPPED_STEPS} steps in a row had no finite gradient; lower --lr, try "
                "--amp off or check the data with python -m dataset.verify"
            )


class EpochSums:
    """Sums since the start of an epoch: losses and unreadable samples of this process, skipped
    steps of all.

    saved: what `state_dict` gave, to continue from. If the number of processes has changed since,
    rank 0 takes the sums of all.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        every: bool,
        in_a_row: int,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        in_a_row = saved["in_a_row"] if saved else in_a_row
        self.guard = FiniteGuard(model, device, every=every, in_a_row=in_a_row)
        self.losses = torch.zeros(2, device=device)  # their sum, their number
        self.unreadable = 0
        if saved:
            *losses, unreadable = own_share(saved["of_processes"])
            self.losses += torch.tensor(losses, device=device)
            self.unreadable = int(unreadable)
            self.guard.restore(saved["skipped"], saved["statistics"])

    def add(self, loss: Tensor) -> None:
        """Add the loss of a batch, if it is finite; does not wait for the device."""
        loss = loss.detach().float()
        self.losses += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite().float()])

    def add_unreadable(self, reasons: Sequence[str], *, most: int) -> None:
        """Count unreadable samples and print why; raise ValueError for more than `most`."""
        self.unreadable += len(reasons)
        for reason in reasons:
            print(f"warning: skipped an unreadable training sample: {reason}", flush=True)
        if self.unreadable > most:
            raise ValueError(
                f"{self.unreadable} training samples of this epoch are unreadable, {most} allowed; "
                f"check the data with python -m dataset.verify; the last one: {reasons[-1]}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors to continue from; a collective call that waits for the device.

        of_processes: a row for each rank with sum and number of losses and unreadable samples.
        statistics: the model's buffers at the epoch's start.
        """
        own = torch.tensor([*self.losses.tolist(), self.unreadable], dtype=torch.float64)
        return {
            "of_processes": gather(own).tolist(),
            "skipped": int(self.guard.skipped),
            "in_a_row": int(self.guard.in_a_row),
            "statistics": self.guard.at_start,
        }


def own_share(rows: list[list[float]]) -> list[float]:
    """This process's saved sums; rank 0 gets the total if the number of processes changed."""
    if len(rows) == world_size():
        return rows[rank()]
    share = 1 if rank() == 0 else 0
    return [share * sum(column) for column in zip(*rows, strict=True)]
