"""Ranks that raise or are killed: the run ends within seconds, shows the true error, leaves nobody.

The launcher is torchrun's own agent; in most cases it and the ranks are forked from a warm
interpreter, in some it is the torchrun command.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests.helpers.layouts import slice_store
from tests.stress.injector import in_a_child
from tests.stress.rows import Row
from tests.stress.runs.strikes import ERRORS, PLACES, Strike, in_variable
from tests.stress.runs.tiny_run import FLAGS, ROOT, SMALL, alive_in_session, as_main, warm_up

MAX_SECONDS = 15  # from the strike to the end of the last process
PATIENCE = 600  # for a launch to come to the strike at all
LAUNCHED = 8
RUN = (
    *FLAGS, "--epochs", "3", "--batch_size", "1", "--val_fraction", "0.34", "--num_workers", "1",
    "--save_every", "1",
)  # fmt: skip
Plan = tuple[int, Strike]  # how many ranks, and what happens


def launcher(world: int, flags: Sequence[str], strike: Strike) -> None:
    """Be torchrun: start ranks by fork, watch them and end them all if one fails."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world, run_id="stress", start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0,
    )  # fmt: skip
    elastic_launch(config, rank_process)(flags, strike)


def rank_process(flags: Sequence[str], strike: Strike) -> None:
    """One rank: u-sam.py with the strike."""
    as_main(flags, lambda: strike.install(int(os.environ["RANK"])))


def begin(world: int, flags: list[str], strike: Strike, *, log: Path, launched: bool) -> int:
    """The number of a launcher that leads a session of its own."""
    if launched:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(world), "-m", "tests.stress.runs.strikes", *flags),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | in_variable(strike)
        with log.open("w", encoding="utf-8") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            ).pid  # fmt: skip

    def child() -> None:
        os.setsid()
        launcher(world, flags, strike)

    return in_a_child(child, log=log)


def wrong_with(world: int, strike: Strike, store: Path, *, folder: Path, launched: bool) -> str:
    """What is wrong with how a run ended after a strike, or ""."""
    log, note = folder / "log", Path(strike.note)
    note.unlink(missing_ok=True)
    log.write_text("", encoding="utf-8")
    flags = [*RUN, "--data_root", str(store), "--output_dir", str(folder / "run")]
    leader = begin(world, flags, strike, log=log, launched=launched)
    try:
        code, seconds = seconds_to_the_end(leader, note)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
        left = alive_in_session(leader)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    output = log.read_text(errors="replace")
    if not note.exists():
        return f"never came to the strike\n{output[-1500:]}"
    if seconds > MAX_SECONDS or left:
        return f"{len(left)} processes left after {seconds:.1f} s\n{output[-1500:]}"
    if not code:
        return "the launcher ended with 0"
    if true_error(strike) not in output:
        return f"does not show {true_error(strike)!r}\n{output[-2500:]}"
    return ""


def true_error(strike: Strike) -> str:
    """What the output must hold: the injected message, or the launcher's word on the signal."""
    return strike.message if strike.how in ERRORS else f"Signal 9 ({strike.how}) received by PID"


def seconds_to_the_end(leader: int, note: Path) -> tuple[int, float]:
    """The launcher's exit code and the seconds from the strike until all its session was gone."""
    begun, code = time.time(), None
    while time.time() - begun < PATIENCE:
        if code is None:
            done, status = os.waitpid(leader, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
        if code is not None and not alive_in_session(leader):
            break
        struck = float(note.read_text(encoding="utf-8") or "inf") if note.exists() else float("inf")
        if time.time() - struck > MAX_SECONDS + 1:
            break
        time.sleep(0.05)
    struck = float(note.read_text(encoding="utf-8")) if note.exists() else begun
    return -1 if code is None else code, time.time() - struck


def plans(number: int, note: Path) -> Iterator[Plan]:
    """`number` deaths: places x ways to die x ranks, in worlds of 2 and 3, early and later."""
    hows = ("SIGKILL", "ValueError", "SIGKILL", "RuntimeError")
    kinds = itertools.product((2, 3), (0, 1), PLACES, hows, (1, 0))
    different = dict.fromkeys(
        (world, place, how, rank, calls if how != "SIGKILL" else 0)
        for world, calls, place, how, rank in kinds
    )
    for world, place, how, rank, calls in itertools.islice(itertools.cycle(different), number):
        yield world, Strike(place, calls, rank, how, str(note))


def run_deaths(number: int, launched: int) -> Row:
    """`number` deaths of a rank, `launched` of them under the torchrun command."""
    warm_up()
    row, started = (
        Row("ranks", "deaths of a rank that end a run as they should", number),
        time.time(),
    )
    with tempfile.TemporaryDirectory() as scratch:
        store, folder = slice_store(Path(scratch) / "store", **SMALL), Path(scratch)
        every = number // launched if launched else number + 1
        for count, (world, strike) in enumerate(plans(number, folder / "struck")):
            by_command = count % every == every - 1
            wrong = wrong_with(world, strike, store, folder=folder, launched=by_command)
            if wrong:
                row.faults.append(f"{strike} of {world}, command {by_command}: {wrong}")
    row.note = f"{launched} under the torchrun command; limit {MAX_SECONDS} s"
    row.seconds = time.time() - started
    return row


def run(*, full: bool) -> list[Row]:
    """The figures of this part: 50 deaths, or four."""
    return [run_deaths(50, LAUNCHED) if full else run_deaths(4, 0)]
