"""Which process evaluates which case, and how what it found comes back to all.

`usam.case_evaluation` shares cases out with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from usam.runtime.distributed import gather, rank, world_size


class CaseShard(Sampler[int]):
    """This rank's samples of an evaluation: all of every world_size-th case, case after case.

    case_ids: the case of each sample; cases keep the order in which they come first. Among all
    ranks each sample comes once.
    """

    def __init__(self, case_ids: Sequence[str]) -> None:
        cases: dict[str, list[int]] = {}
        for index, case in enumerate(case_ids):
            cases.setdefault(case, []).append(index)
        self.indices = [i for own in list(cases.values())[rank() :: world_size()] for i in own]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def gather_texts(text: str) -> list[str]:
    """`text` of every process, in order of rank, on all of them; sent as bytes."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = gather(torch.tensor(len(own))).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(own)] = own
    received = gather(padded)
    return [
        part[:size].numpy().tobytes().decode() for part, size in zip(received, sizes, strict=True)
    ]
