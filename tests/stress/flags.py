"""Command lines drawn at random: each is refused in one line or runs, and never more processes.

All go through the parser and its checks in this process; some are real processes of u-sam.py on a
tiny store, with a time limit each, their processes counted while they run.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from tests.helpers.layouts import slice_store
from tests.stress.rows import Row
from tests.stress.tiny_run import SCRIPT, alive_in_session
from usam.cli.choices import MODELS
from usam.cli.flags import FLAGS, MED3D, USAM, Flag
from usam.cli.parser import fill_defaults, parse_flags

MAX_SECONDS = 2.0  # of computing for a line in this process
MAX_WALL = 150  # seconds for a real process, on a shared machine
MEMORY = 6 << 30  # bytes of address space for a real process
MAX_LINE = 1000  # characters of a refusal
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
# Of real runs: nothing large, long or from the network. Given last, so that they win.
TINY = (
    "--sam_model", "vit_tiny", "--sam_weight", "none", "--img_size", "32", "--device", "cpu",
    "--amp", "off", "--compile", "off", "--epochs", "1", "--batch_size", "4", "--num_workers", "0",
)  # fmt: skip


class Known(NamedTuple):
    """Values with which flags do something, in a folder of their own."""

    folder: Path
    values: dict[str, tuple[str, ...]]


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
        while len(verdicts) < number:
            words = draw_run(draw, known)
            if words is None:
                continue
            verdicts.append(judge_process(words, folder))
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


def judge_process(words: Sequence[str], folder: Path) -> str:
    """ "refused", "ran", or what was wrong with a process of u-sam.py that got these words."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "given", place)
    command = [sys.executable, str(SCRIPT), *words, *TINY, "--output_dir", "out"]
    if "--model" not in words:
        command += ["--dataset", "store", "--data_root", str(folder / "store")]
    with (place / "stdout").open("wb") as out, (place / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=place, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True, preexec_fn=lower, env=plain_environment(),
        )  # fmt: skip
        most, until = 0, time.monotonic() + MAX_WALL
        while process.poll() is None and time.monotonic() < until:
            most = max(most, len(alive_in_session(process.pid)))
            time.sleep(0.05)
        late = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if late:
        return f"took over {MAX_WALL} s"
    if most > 1:  # --num_workers 0
        return f"{most} processes"
    texts = [(place / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    if any("Traceback" in text for text in texts):
        return f"traceback: {texts[1].strip().splitlines()[-1:]!r:.200}"
    if process.returncode == 0:
        return "ran"
    lines = [line for line in texts[1].splitlines() if line.startswith("u-sam.py: error: ")]
    if process.returncode != 2 or len(lines) != 1 or not is_one_line(lines[0]):
        return f"code {process.returncode}, {len(lines)} errors: {texts[1][-200:]!r}"
    return "refused"


def lower() -> None:
    """Let a real process have what a small run needs, after everybody else."""
    os.nice(15)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def plain_environment() -> dict[str, str]:
    """This process's variables without a launcher's, and with one thread."""
    others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


# ---------------------------------------------------------------------------------- material


def make_known(folder: Path) -> Known:
    """Files that flags may name, under names without a folder, and other fitting values."""
    given = folder / "given"
    given.mkdir(parents=True)
    volume = np.random.default_rng(1).integers(-1000, 400, (12, 12, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([-2.0, -2, 3, 1])), given / "scan.nii.gz")
    prompts = {
        "good.json": '{"point": [[3, 4, 1]]}',
        "long.json": f'{{"point": [[{"9" * 401}, 4, 1]]}}',
        "longer.json": f'{{"point": [[{"9" * 5000}, 4, 1]]}}',
        "deep.json": "[" * 50_000,
        "cut.json": '{"point": [[3,',
        "text.json": "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    }
    for name, text in prompts.items():
        (given / name).write_text(text, encoding="utf-8")
    (given / "folder").mkdir()
    (given / "broken.pth").write_bytes(b"PK\x03\x04 cut short")
    files = ("scan.nii.gz", "broken.pth", "best.pth", "folder", "good.json")
    return Known(folder, {
        "predict": ("scan.nii.gz", "folder", "good.json", "nowhere"),
        "resume": ("best.pth", "best.pth", "broken.pth", "auto", "scan.nii.gz", "folder"),
        "prompts": tuple(prompts),
        "init": files, "lora_weight": files, "init_mask": files, "merge": ("folder", "."),
        "sam_weight": ("none", "broken.pth", "nowhere.pth"), "data_root": ("folder", "nowhere"),
        "export_lora": ("lora.pth", "lora.safetensors", "lora.txt", "best.pth"),
        "output_dir": ("out", "folder"), "device": ("cpu", "cuda", "mps", "auto", "gpu"),
        "window": ("-160", "240", "percentile", "liver", "240 -160"), "classes": ("a", "b"),
        "empty": ("keep", "drop", "50%"), "foreground_share": ("33%",), "ema": ("0.9",),
        "prompt_jitter": ("3", "2%"), "class_weights": ("none", "balanced", "1,2,3", "1,2"),
        "dist_url": ("env://", "tcp://127.0.0.1:1", "nowhere"), "val_fraction": ("0", "0.34"),
        "img_size": ("32", "48"), "num_workers": ("0", "1"), "seed": ("1", str(2**63 - 1)),
        "world_size": ("1", "2", "4096"), "fold": ("0", "1"),
    })  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """A tiny store, and the best.pth of a run on it among the given files."""
    slice_store(folder / "store", train=4, side=32, num_slices=4, test=1)
    command = [sys.executable, str(SCRIPT), *TINY, "--dataset", "store", "--data_root",
               str(folder / "store"), "--output_dir", str(folder / "first")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=plain_environment(), timeout=600)
    shutil.copy(folder / "first" / "best.pth", folder / "given" / "best.pth")


def short(words: Sequence[str]) -> str:
    """A line as it could be typed, long values cut."""
    return " ".join(ascii(word[:40])[1:-1] for word in words)[:300]
