"""What an epoch adds up on the device, and how a run stopped within one takes it up again.

The engine keeps one for each epoch; a checkpoint within an epoch holds its `state`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usam.runtime.processes import gather, rank, world_size
from usam.training.finite_guard import FiniteGuard


class EpochSums:
    """Since the epoch began: losses and unreadable samples of this process, steps left out by all.

    saved: what `state` gave, to go on from there. After a change of the number of processes the
    first one takes over what all of them had.
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
        """Take in the loss of a batch, if it is finite; no wait for the device."""
        loss = loss.detach().float()
        self.losses += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite().float()])

    def leave_out(self, reasons: Sequence[str], *, most: int) -> None:
        """Count samples that could not be read, and say why; raise ValueError above `most`."""
        self.unreadable += len(reasons)
        for reason in reasons:
            print(f"warning: a training sample is left out: {reason}", flush=True)
        if self.unreadable > most:
            raise ValueError(
                f"{self.unreadable} training samples of this epoch cannot be read, over the {most} "
                f"allowed; check them with python -m dataset.verify; the last: {reasons[-1]}"
            )

    def state(self) -> dict[str, Any]:
        """Plain values and tensors to go on from; every process must ask, and waits for the device.

        of_processes: a row each of the sum and number of losses and unreadable samples.
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
    """This process's row of those kept for each; all of them summed up, if they are not as many."""
    if len(rows) == world_size():
        return rows[rank()]
    share = 1 if rank() == 0 else 0
    return [share * sum(column) for column in zip(*rows, strict=True)]
