"""Samples that cannot be read: left out of training, counted, and too many are an error.

training.py takes its samples through `Quarantine`; the engine counts what `collate` says.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, default_collate

UNREADABLE = "unreadable"  # in an item: why another stands in its place; in a batch: all of those
SHARE = 0.01  # of the samples may be unreadable
FAULTS = (OSError, ValueError, EOFError)


def most_unreadable(num_samples: int) -> int:
    """Samples of an epoch that a process may find unreadable: one in a hundred, at least one."""
    return max(1, int(num_samples * SHARE))


class Quarantine(Dataset):
    """The items of `data` for training; the next readable one stands in for one that is not.

    A step keeps its size so, which processes with gradients in common need. Such an item says under
    UNREADABLE what was wrong. Where too many in a row cannot be read, the last error is raised.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, epoch = key
        reason = None
        for more in range(most_unreadable(len(self)) + 1):
            try:
                item = self.data[(index + more) % len(self), epoch]
            except FAULTS as error:
                fault, reason = error, reason or str(error) or type(error).__name__
                continue
            return item | {UNREADABLE: reason} if reason else item
        raise fault


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items, with the reasons of those that stand in for an unreadable one, if any."""
    reasons = [item[UNREADABLE] for item in items if UNREADABLE in item]
    batch = default_collate(
        [{key: value for key, value in item.items() if key != UNREADABLE} for item in items]
    )
    return batch | {UNREADABLE: reasons} if reasons else batch
