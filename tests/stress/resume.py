"""Runs stopped at any step and resumed end in the very state of a run that was never stopped.

Real runs of u-sam.py on a tiny network: stopped by SIGTERM or SIGKILL in one of their batches, then
started again with --resume auto; some of them through torchrun.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.helpers.layouts import slice_store
from tests.stress.digest import differences, run_digest
from tests.stress.injector import wait_for
from tests.stress.rows import Row
from tests.stress.runs.strikes import Strike, in_variable
from tests.stress.runs.tiny_run import FLAGS, ROOT, SMALL, start, warm_up
from usam.runtime.signals import STOPPED

EPOCHS = 3
STEPS = 24  # batches of a run on one process: 8 an epoch, optimizer steps after 3, 3 and 2
SECONDS = 120  # a run takes about one
LAUNCHED = 8
RUN = (
    *FLAGS,
    *("--epochs", str(EPOCHS), "--accumulation_steps", "3", "--val_fraction", "0.34"),
    *("--save_every", "1", "--keep", "1", "--resume", "auto"),
)


class Case(NamedTuple):
    """One stop: how many ranks and loader workers, at which batch, by which signal."""

    world: int
    workers: int
    step: int
    how: str
    launched: bool = False

    def __str__(self) -> str:
        text = f"{self.world} ranks, {self.workers} workers, {self.how} at batch {self.step}"
        return text + (", torchrun" if self.launched else "")


def flags_of(case: Case, store: Path, folder: Path) -> list[str]:
    """The command of a case; the same for the run that is stopped and the one that goes on."""
    batch_size = 2 // case.world  # samples a step stay the same
    return [
        *RUN, "--batch_size", str(batch_size), "--num_workers", str(case.workers),
        "--data_root", str(store), "--output_dir", str(folder),
    ]  # fmt: skip


def run_once(
    case: Case, store: Path, folder: Path, *, strike: Strike | None = None
) -> tuple[list[int], str]:
    """(exit codes, output) of one run of a case's command, with a strike or to its end."""
    log, flags = folder.with_suffix(".log"), flags_of(case, store, folder)
    log.unlink(missing_ok=True)
    if case.launched:
        return launch_once(case, flags, log, strike=strike)
    children = start(
        flags, log, world=case.world, inject=strike.install if strike else lambda rank: None
    )
    codes = [ended(child) for child in children]
    return codes, log.read_text(encoding="utf-8")


def ended(child: int) -> int:
    """How a child ended, by its own or, after SECONDS, by a kill."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGABRT)
    return wait_for(child)


def launch_once(
    case: Case, flags: Sequence[str], log: Path, *, strike: Strike | None
) -> tuple[list[int], str]:
    """The same through torchrun, whose one exit code it gives."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(case.world), "-m", "tests.stress.runs.strikes", *flags),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (in_variable(strike) if strike else {})
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return [code], log.read_text(encoding="utf-8")


def tried(case: Case, store: Path, folder: Path, *, wanted: str, whole: Path) -> str:
    """What is wrong with a case, or "": it was not stopped, did not go on or ended otherwise."""
    shutil.rmtree(folder, ignore_errors=True)
    rank, note = case.step % case.world, folder.with_suffix(".struck")
    note.unlink(missing_ok=True)
    launcher = case.launched and case.how == "SIGTERM"
    strike = Strike("forward", case.step, rank, case.how, str(note), to_launcher=launcher)
    codes, output = run_once(case, store, folder, strike=strike)
    if not note.exists() or not any(codes):
        return f"was not stopped: {codes}\n{output[-1500:]}"
    if case.how == "SIGTERM" and not case.launched and set(codes) != {STOPPED}:
        return f"ended with {codes}, not {STOPPED}\n{output[-1500:]}"
    if case.how == "SIGKILL" and not case.launched and codes[rank] != -signal.SIGKILL:
        return f"ended with {codes}, not by the kill\n{output[-1500:]}"
    codes, output = run_once(case, store, folder)
    if any(codes):
        return f"did not go on: {codes}\n{output[-1500:]}"
    if run_digest(folder) != wanted:
        return f"another end: {', '.join(differences(folder, whole)[:5]) or 'the log'}"
    return ""


def cases(steps: Sequence[int], launched: int) -> list[Case]:
    """{1, 2} ranks x {0, 2} workers x steps x both signals; some of two ranks through torchrun."""
    found = [
        Case(*parts) for parts in itertools.product((1, 2), (0, 2), steps, ("SIGTERM", "SIGKILL"))
    ]
    pairs = [number for number, case in enumerate(found) if case.world == 2]
    for number in pairs[:: max(1, len(pairs) // launched)][:launched] if launched else []:
        found[number] = found[number]._replace(launched=True)
    return found


def run_resumes(steps: Sequence[int], launched: int) -> Row:
    """Every case against the run of as many ranks that was never stopped."""
    warm_up()
    started, wanted = time.monotonic(), cases(steps, launched)
    row = Row("resume", "stopped and resumed runs equal to the uninterrupted one", len(wanted))
    with tempfile.TemporaryDirectory() as scratch:
        store = slice_store(Path(scratch) / "store", **SMALL)
        digests = {}
        for world in sorted({case.world for case in wanted}):
            whole = Path(scratch) / f"whole-{world}"
            codes, output = run_once(Case(world, 0, 0, ""), store, whole)
            if any(codes):
                raise RuntimeError(f"an uninterrupted run ended with {codes}:\n{output[-3000:]}")
            digests[world] = run_digest(whole)
        for case in wanted:
            whole = Path(scratch) / f"whole-{case.world}"
            wrong = tried(
                case, store, Path(scratch) / "run", wanted=digests[case.world], whole=whole
            )
            if wrong:
                row.faults.append(f"{case}: {wrong}")
    through = sum(case.launched for case in wanted)
    row.note = f"{{1, 2}} ranks x {{0, 2}} workers x {len(steps)} steps x 2 signals; " \
        f"{through} through torchrun"  # fmt: skip
    row.seconds = time.monotonic() - started
    return row


def run(*, full: bool) -> list[Row]:
    """The figures of this part: every batch of the run as its stop, or three of them."""
    if full:
        return [run_resumes(range(STEPS), LAUNCHED)]
    return [run_resumes((4, 8, 23), 0)]
