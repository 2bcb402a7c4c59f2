"""u-sam.py on a tiny network and data, in forked processes: a warm start where a launch is slow.

The parts that stop and kill training runs use it; the parent has imported all of it once.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.toy import Toy
from tests.stress.counts import free_port
from tests.stress.injector import in_a_child
from usam.weights import usam as weights

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "u-sam.py"
SMALL = {"side": 16, "num_slices": 4, "test": 1}  # the slices they run on
FLAGS = (
    *("--dataset", "store", "--sam_model", "vit_tiny", "--sam_weight", "none", "--img_size", "16"),
    *("--device", "cpu", "--amp", "off", "--recipe", "published", "--warmup"),
    *("--clip_max_norm", "1", "--prompt_mode", "3"),
)


class TinyNet(Toy):
    """A network of some hundred weights in U-SAM's place; all else is u-sam.py's own."""

    preparation = "usam"

    def parameter_groups(self, lr: float, lr_vit: float, lr_backbone: float) -> list[dict]:
        """Two groups, so that rates differ."""
        first, *rest = self.parameters()
        return [{"params": rest, "lr": lr}, {"params": [first], "lr": lr_vit}]

    def forward(self, image: Tensor, *args: Any, **prompts: Any) -> Tensor:
        """Logits of an image of one channel, or of the first of three."""
        return super().forward(image[:, :1], *args, **prompts)

    def parts(self) -> dict[str, list]:
        """All parameters by part."""
        return {"network": list(self.parameters())}


def use_tiny_net() -> None:
    """Let this process build TinyNet wherever it would build U-SAM."""

    def build(sam_model: str, num_classes: int = 3, *_: Any, **__: Any) -> TinyNet:
        return TinyNet(num_classes)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "usam" and hasattr(module, "build_usam"):
            module.build_usam = build
    weights.initialize = lambda *_, **__: "a tiny network starts from random weights"


def warm_up() -> None:
    """Import what u-sam.py imports, so that forked children need not."""
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(SCRIPT), run_name="warm")
    for name in ("usam.training.run", "usam.evaluation.slices", "usam.prediction.slices"):
        importlib.import_module(name)


def as_main(flags: Sequence[str | Path], inject: Callable[[], None] = lambda: None) -> None:
    """Be `python u-sam.py flags` in this process, after `inject`; ends by SystemExit or returns."""
    torch.set_num_threads(1)  # a new pool: torch's threads would race to replace the parent's
    random.seed(os.getpid())  # a fresh process starts from other random numbers each time
    np.random.seed(os.getpid())
    sys.argv = [str(SCRIPT), *map(str, flags)]
    sys.path.insert(0, str(ROOT))
    use_tiny_net()
    inject()
    runpy.run_path(str(SCRIPT), run_name="__main__")


def start(
    flags: Sequence[str | Path],
    log: Path,
    *,
    world: int = 1,
    inject: Callable[[int], None] = lambda rank: None,
) -> list[int]:
    """The numbers of `world` forked processes that run u-sam.py together; output goes to `log`.

    Each leads a process group of its own, so that its loader's workers can be found. inject is
    called in each with its rank, before u-sam.py begins.
    """
    port = free_port()

    def process(rank: int) -> None:
        os.setpgid(0, 0)
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            as_main(flags, lambda: inject(rank))
        finally:  # as a Python process does when it ends, which a forked one skips
            for worker in multiprocessing.active_children():
                worker.terminate()

    return [in_a_child(lambda rank=rank: process(rank), log=log) for rank in range(world)]


def alive_in_session(session: int) -> list[int]:
    """Processes of a session that still run; zombies do not."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            number = int(entry.name)
            fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(number)
    return found
