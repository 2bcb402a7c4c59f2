"""Strikes in a training run: a signal or an error in forward, backward, evaluation or save.

Parts that stop and kill runs install one in a process that is about to become u-sam.py;
`python -m tests.stress.runs.strikes FLAGS` is such a process for launchers.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.stress.injector import Injector, Moment, on_call
from tests.stress.runs.tiny_run import as_main
from usam.evaluation import pixels
from usam.training.checkpoint import CheckpointWriter
from usam.training.usam import SegmentationStep

VARIABLE = "STRESS_STRIKE"
PLACES = ("forward", "backward", "evaluation", "save")
ERRORS = {"ValueError": ValueError, "RuntimeError": RuntimeError}


@dataclass(frozen=True)
class Strike:
    """place: one of PLACES, at its call `number` on `rank`; how: a signal's name or an error's.

    note: the file that the moment is written to. to_launcher: signal the parent, not the rank.
    """

    place: str
    number: int
    rank: int
    how: str
    note: str
    to_launcher: bool = False

    @property
    def message(self) -> str:
        """What the injected error says."""
        return f"injected in {self.place} on rank {self.rank}"

    def act(self) -> None:
        """Note the time, then send the signal or raise the error."""
        Path(self.note).write_text(f"{time.time()}", encoding="utf-8")
        if self.how in ERRORS:
            raise ERRORS[self.how](self.message)
        target = os.getppid() if self.to_launcher else os.getpid()
        os.kill(target, signal.Signals[self.how])

    def install(self, rank: int) -> None:
        """Patch this process where it is `rank`."""
        if rank == self.rank:
            {
                "forward": self._in_forward,
                "backward": self._in_backward,
                "evaluation": self._in_evaluation,
                "save": self._in_save,
            }[self.place]()

    def _in_forward(self) -> None:
        step = SegmentationStep.__call__
        SegmentationStep.__call__ = on_call(self.number, self.act, step)

    def _in_backward(self) -> None:
        step, calls = SegmentationStep.__call__, iter(range(10**9))

        def struck(*given: Any) -> torch.Tensor:
            loss = step(*given)
            if next(calls) == self.number:
                loss.register_hook(lambda gradient: self.act())
            return loss

        SegmentationStep.__call__ = struck

    def _in_evaluation(self) -> None:
        predictions = pixels.predictions

        def struck(*args: Any, **how: Any) -> Iterator[Any]:
            for number, batch in enumerate(predictions(*args, **how)):
                if number == self.number:
                    self.act()
                yield batch

        pixels.predictions = struck

    def _in_save(self) -> None:
        """On rank 0 and by SIGKILL within the writing of last.pth, else where the save begins."""
        if self.rank == 0 and self.how == "SIGKILL":
            place = Moment(2, "within", 100)
            injector = Injector(place, self.act, only=lambda path: ".last.pth" in path)
            watching = injector.watching()
            watching.__enter__()
            atexit.register(watching.__exit__, None, None, None)  # holds it until the end
        else:
            CheckpointWriter.save = on_call(self.number, self.act, CheckpointWriter.save)


def in_variable(strike: Strike) -> dict[str, str]:
    """The environment variable that makes `python -m tests.stress.runs.strikes` strike."""
    return {VARIABLE: json.dumps(asdict(strike))}


def main() -> None:
    """Be u-sam.py with the strike that the environment names, as a process of a launcher."""
    torch.set_num_threads(1)
    given = os.environ.get(VARIABLE)

    def inject() -> None:
        if given:
            Strike(**json.loads(given)).install(int(os.environ.get("RANK", 0)))

    as_main(sys.argv[1:], inject)


if __name__ == "__main__":
    main()
