"""Command lines drawn at random: each is refused in one line or runs, and never more processes.

All go through the parser and its checks in this process; some are processes of u-sam.py on a tiny
store, with a time limit each, their processes counted while they run.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.stress.hostile.flag_files import (
    TINY,
    Known,
    make_checkpoint,
    make_known,
    plain_environment,
)
from tests.stress.rows import Row
from tests.stress.runs.tiny_run import SCRIPT, alive_in_session, warm_up
from usam.cli.choices import MODELS
from usam.cli.flags import FLAGS, MED3D, USAM, Flag
from usam.cli.parser import fill_defaults, parse_flags

MAX_SECONDS = 2.0  # of computing for a line in this process
MAX_CPU = 90  # seconds of computing for a real process
MAX_WALL = 900  # seconds on the clock, as machines are shared
MEMORY = 6 << 30  # bytes of address space for a real process
MAX_LINE = 1000  # characters of a refusal
OWN_PYTHON = 20  # of so many processes one starts Python itself; the others are forked
# Values that no flag, or few, can take. {} stands for a number drawn at random.
ODD = (
    "", " ", "--", "-", "---", "-1", "-0", "0", "1", "-1e3", "1e20", "1e400", "-inf", "nan", "inf",
    "9" * 25, "9" * 401, "9" * 5000, "0x10", "1_000", "٣", "1,2", "1,,2", "1,-2", "5%", "101%",
    "%s", "%(prog)s", "{}", "{}.5", "keep", "drop", "none", "auto", "mixed", "published", "strong",
    "balanced", "cpu", "cpu:0", "cuda", "cuda:99999999999999999999", "a\x1b[31mb", "a\nb", "a\tb",
    "\u202egnp.nii", "\udcff", "é" * 300, "x" * 5000, "nowhere/none.pth", ".", "..", "vit_tiny",
    "$HOME", "*", "'", '"', "\\", "=1+1", "@file", "tcp://a:b", "file://", "--epochs", "--eval",
)  # fmt: skip
EXTRA = ("-h1", "-", "--", "x", "--=", "--=1", "-x", "--no_such", "--epochs=", "--eval=1", "--ép")


def run(*, full: bool) -> list[Row]:
    """The rows of this part."""
    lines, launches = (20_000, 500) if full else (2_000, 12)
    return [run_lines(lines - launches), run_processes(launches)]


# ----------------------------------------------------------------------- lines drawn at random


def draw_line(draw: random.Random, known: Known) -> list[str]:
    """The words of a command line: some flags with values that fit, or do not, or none."""
    words: list[str] = []
    odd = draw.choice((0.0, 0.1, 0.4))
    model = draw.choice(MODELS)
    if model == MED3D:
        words += ["--model", model]
    flags = [flag for flag in FLAGS if odd or (flag.fits(model) and not flag.runs)]
    for _ in range(draw.choice((1, 1, 2, 3, 4, 6, 9))):
        flag = draw.choice(flags)
        name = f"--{flag.name}"
        if draw.random() < odd / 4:
            name = mistyped(draw, name)
        values = draw_values(draw, flag, known, odd)
        if len(values) == 1 and draw.random() < 0.2:
            words.append(f"{name}={values[0]}")
        else:
            words += [name, *values]
    if draw.random() < odd / 4:
        words.insert(draw.randrange(len(words) + 1), draw.choice(EXTRA))
    return words


def draw_values(draw: random.Random, flag: Flag, known: Known, odd: float) -> list[str]:
    """As many values as the flag takes; `odd` is how often they, or their number, do not fit."""
    if flag.type is None:
        return [] if draw.random() >= odd / 4 else [draw.choice(ODD)]
    number = flag.nargs if isinstance(flag.nargs, int) else 1
    if flag.nargs == "+":
        number = draw.choice((1, 1, 2, 3, 4, 6))
    if draw.random() < odd / 4:
        number = draw.randrange(6)
    return [draw_value(draw, flag, known, odd) for _ in range(number)]


def draw_value(draw: random.Random, flag: Flag, known: Known, odd: float) -> str:
    """A value that the flag may take, or an odd one."""
    if draw.random() < odd:
        return draw.choice(ODD).replace("{}", str(draw.randrange(-3, 10**6)))
    if flag.choices:
        return str(draw.choice(flag.choices))
    if flag.name in known.values:
        return draw.choice(known.values[flag.name])
    return draw.choice(("0", "1", "2", "3", "0.5", "7", "16", "48"))


def mistyped(draw: random.Random, name: str) -> str:
    """A flag's name with a letter left out, doubled, changed or with hyphens."""
    place = draw.randrange(2, len(name))
    return draw.choice((
        name[:place] + name[place + 1 :],
        name[:place] + name[place] + name[place:],
        name[:place] + "x" + name[place + 1 :],
        name.replace("_", "-"),
        name[:place],
        name.upper(),
    ))  # fmt: skip


def draw_checkpoint(draw: random.Random) -> dict[str, Any] | None:
    """What a checkpoint says of its run, as far as the flags ask for it; None for a fresh start."""
    if draw.random() < 0.4:
        return None
    args = {"model": draw.choice(("u-sam", "sam-med3d")), "lr": 0.1, "dataset": "store"}
    args |= draw.choice(({}, {"focal_gamma": 2.0}, {"patience": 3}, {"focal_gamma": 0.0}))
    args |= draw.choice(({}, {"adapter": "none", "tuning": "lora"}, {"sam_model": "vit_tiny"}))
    return {"args": args, "data": draw.choice(({}, {"img_size": 32, "prompt_mode": 3}))}


# --------------------------------------------------------------------------- in this process


def run_lines(number: int, seed: int = 20261128) -> Row:
    """Lines through the parser, its checks and the defaults."""
    row = Row("flags", "command lines refused in one line or understood", number)
    started, draw, refused = time.monotonic(), random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        known = make_known(Path(folder))
        for _ in range(number):
            words, saved = draw_line(draw, known), draw_checkpoint(draw)
            verdict = judge_line(words, saved)
            refused += verdict == "refused"
            if verdict not in ("refused", "understood"):
                row.faults.append(f"{verdict}: {short(words)}")
    row.note = f"{refused:,} refused"
    row.seconds = time.monotonic() - started
    return row


def judge_line(words: list[str], saved: dict[str, Any] | None) -> str:
    """ "understood", "refused", or what was wrong with how a line was answered."""
    errors, output = io.StringIO(), io.StringIO()
    started = time.process_time()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            args = parse_flags(words)
            fill_defaults(args, saved)
        verdict = "understood" if isinstance(args, Namespace) else f"gave {args!r:.50}"
    except SystemExit as end:
        verdict = judge_refusal(end.code, errors.getvalue(), output.getvalue())
    except ValueError as error:
        verdict = "refused" if is_one_line(str(error)) else f"not one line: {error!r:.200}"
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error!s:.150}"
    if time.process_time() - started > MAX_SECONDS:
        verdict = f"took over {MAX_SECONDS} s"
    return verdict


def judge_refusal(code: object, errors: str, output: str) -> str:
    """ "refused" for code 2 and one line on stderr, "understood" for help."""
    if code == 0 and output.startswith("usage: "):
        return "understood"
    lines = [line for line in errors.split("\n") if line and not line.startswith("warning: ")]
    if code != 2 or output or len(lines) != 1:
        return f"code {code} and {len(lines)} lines: {errors!r:.200}"
    if not lines[0].startswith("u-sam.py: error: ") or not is_one_line(lines[0]):
        return f"not one line: {errors!r:.200}"
    return "refused"


def is_one_line(text: str) -> bool:
    """Whether a message is a short line that a terminal shows as it is."""
    return 0 < len(text) <= MAX_LINE and "\n" not in text


# --------------------------------------------------------------------------- real processes


def run_processes(number: int, seed: int = 17) -> Row:
    """Lines given to `python u-sam.py`, one after the other."""
    row = Row("flags", "processes of u-sam.py that refuse in one line or run", number)
    started, draw, verdicts = time.monotonic(), random.Random(seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = make_known(folder)
        make_checkpoint(folder)
        warm_up()
        while len(verdicts) < number:
            words = draw_run(draw, known)
            if words is None:
                continue
            own = len(verdicts) % OWN_PYTHON == 0
            verdicts.append(judge_process(words, folder, fork=not own))
            if verdicts[-1] not in ("refused", "ran"):
                row.faults.append(f"{verdicts[-1]}: {short(words)}")
    row.note = f"{verdicts.count('ran'):,} ran to the end"
    row.seconds = time.monotonic() - started
    return row


def draw_run(draw: random.Random, known: Known) -> list[str] | None:
    """A line for a real process; None for one that cannot be passed on, or would fill the disk."""
    words = draw_line(draw, known)
    if draw.random() < 0.6:  # nearer to a run: every flag with a value that fits
        words = draw_fitting(draw, known)
    try:
        encoded = [os.fsencode(word) for word in words]
    except UnicodeEncodeError:
        return None
    if any(b"\0" in word for word in encoded) or "-h1" in words:
        return None
    return words


def draw_fitting(draw: random.Random, known: Known) -> list[str]:
    """Flags that go together, mostly with values that fit."""
    kind = draw.choice(("train", "train", "eval", "predict", "merge", "export"))
    words = {
        "train": [],
        "eval": ["--eval", "--resume", "best.pth"],
        "predict": ["--predict", "scan.nii.gz", "--resume", "best.pth"],
        "merge": ["--merge", "merged"],
        "export": ["--resume", "best.pth", "--export_lora", "lora.pth"],
    }[kind]
    fit = [
        flag
        for flag in FLAGS
        if flag.fits(USAM) and (kind in flag.runs or (kind == "train" and flag.resume))
    ]
    for flag in draw.sample(fit, min(len(fit), draw.randrange(4))):
        odd = draw.choice((0, 0, 0, 0.5))
        words += [f"--{flag.name}", *draw_values(draw, flag, known, odd)]
    return words


def judge_process(words: Sequence[str], folder: Path, *, fork: bool) -> str:
    """ "refused", "ran", or what was wrong with a process of u-sam.py that got these words.

    fork: a child of this process, which has imported everything; else a Python of its own.
    """
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "given", place)
    words = [*words, *TINY, "--output_dir", "out"]
    if "--model" not in words:
        words += ["--dataset", "store", "--data_root", str(folder / "store")]
    child = begin(words, place, fork=fork)
    most, until, status = 0, time.monotonic() + MAX_WALL, None
    while status is None and time.monotonic() < until:
        most = max(most, len(lasting_in_session(child)))
        time.sleep(0.02)
        status = ended(child)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return f"took over {MAX_WALL} s"
    if most > 1:  # --num_workers 0
        return f"{most} processes"
    texts = [(place / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    if any("Traceback" in text for text in texts):
        return f"traceback: {texts[1].strip().splitlines()[-1:]!r:.200}"
    if status == 0:
        return "ran"
    lines = [line for line in texts[1].splitlines() if line.startswith("u-sam.py: error: ")]
    if status != 2 or len(lines) != 1 or not is_one_line(lines[0]):
        return f"code {status}, {len(lines)} errors: {texts[1][-200:]!r}"
    return "refused"


def lasting_in_session(session: int) -> set[int]:
    """Processes of a session that compute; git, asked once for the revision, is not one of them."""
    found = set(alive_in_session(session))
    if len(found) > 1:
        time.sleep(0.2)
        found = {n for n in found & set(alive_in_session(session)) if name_of(n) != "git"}
    return found


def name_of(process: int) -> str:
    """Name of a process's program, "" if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text(encoding="utf-8").strip()
    return ""


def begin(words: Sequence[str], place: Path, *, fork: bool) -> int:
    """The number of a process that is `python u-sam.py words` in the folder `place`."""
    if child := os.fork():
        return child
    try:
        os.setsid()
        os.chdir(place)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644), number)
        os.nice(10)
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU, MAX_CPU))
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = used * resource.getpagesize() + MEMORY if fork else MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if not fork:
            os.execve(sys.executable, [sys.executable, str(SCRIPT), *words], plain_environment())
        os._exit(be_main(words))
    finally:
        os._exit(99)


def be_main(words: Sequence[str]) -> int:
    """Be u-sam.py in this forked process; its exit code."""
    os.environ.update(plain_environment())
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [str(SCRIPT), *words]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def ended(child: int) -> int | None:
    """The exit code of a child, minus the signal that killed it, or None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def short(words: Sequence[str]) -> str:
    """A line as it could be typed, long values cut."""
    return " ".join(ascii(word[:40])[1:-1] for word in words)[:300]
