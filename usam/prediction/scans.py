"""The scans of --predict one after the other; one that fails does not stop the others."""

from __future__ import annotations

import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from dataset.files import sweep
from dataset.scans.find import find_scans
from dataset.text import counted, printable
from usam.prediction.results import ResultFiles, result_names, without_results
from usam.runtime.processes import is_main, rank, reduce_sum, say, world_size

TERMINATED = 128 + signal.SIGTERM  # exit code


def scans_to_predict(args: Namespace) -> list[Path]:
    """The scans of --predict, results of earlier predictions in folders left out.

    Raises ValueError where --point, --box or --init_mask of one scan meet several.
    """
    found = list(dict.fromkeys(find_scans(args.predict)))
    scans = without_results(found, args.predict)
    if len(scans) < len(found):
        say(f"skipped {counted(len(found) - len(scans), 'result')} of earlier predictions")
    if not scans:
        raise ValueError("--predict: no scans but results of earlier predictions")
    given = [flag for flag in ("point", "box", "init_mask") if getattr(args, flag)]
    if given and len(scans) > 1:
        raise ValueError(
            f"--{given[0]} is for one scan, --predict names {len(scans)}; give prompts of several "
            "scans with --prompts FILE"
        )
    return scans


def predict_each(
    args: Namespace,
    scans: list[Path],
    segment: Callable[[Path, ResultFiles], str],
    device: torch.device,
) -> None:
    """Call `segment` for every scan and where its results go, and print the lines it returns.

    Each process takes its share. A scan that fails is reported and does not stop the others;
    afterwards ValueError gives their number. A single scan's own error is raised as it is.
    """
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sweep(args.output_dir)
    inputs = {scan.resolve() for scan in scans}
    own = list(zip(scans, result_names(scans), strict=True))[rank() :: world_size()]
    failed = 0
    with terminated_as_exit():
        for path, name in tqdm(
            own, desc="predicting", unit="scan", disable=not is_main() or len(own) < 2, leave=False
        ):
            files = ResultFiles(args.output_dir, name, plain=args.names == "nnunet")
            try:
                files.check(inputs, overwrite=args.overwrite)
                text = segment(path, files)
            except AssertionError:  # a mistake of ours
                raise
            except Exception as error:
                problem = in_one_line(path, error)
                if len(scans) == 1:
                    raise problem from error
                failed += 1
                line = printable(problem, keep="\n")
                tqdm.write(f"u-sam.py: error: {line}", file=sys.stderr)
            else:
                tqdm.write(printable(text, keep="\n"))
    if number := int(reduce_sum(torch.tensor(failed, device=device))):
        total = counted(len(scans), "scan")
        raise ValueError(f"{number} of {total} not segmented; see the errors above")


def in_one_line(path: Path, error: Exception) -> Exception:
    """The error as one line that names the scan."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ValueError | OSError) and text:
        return error if path.name in text else ValueError(f"{path}: {text}")
    kind = "not enough memory" if _is_memory(error) else type(error).__name__
    return ValueError(f"{path}: {kind}{': ' if text else ''}{text}")


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Context manager in which SIGTERM raises SystemExit, so that unfinished files are removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
