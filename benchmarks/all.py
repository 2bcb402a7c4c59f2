"""Every benchmark after the other, and benchmarks/RESULTS.md written from what they print.

    python -m benchmarks.all [--quick] [--device cuda] [--only train_step evaluate ...]

A device's part of RESULTS.md is replaced, the other's stays; without a GPU the GPU's part is the
list of rows with "unmeasured". --quick proves that all runs and writes nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks import harness

RESULTS = Path(__file__).with_name("RESULTS.md")
BENCHMARKS = (
    "train_step", "evaluate", "end_to_end", "cached", "data", "encoder3d", "train_step3d",
    "memory", "profile",
)  # fmt: skip
ALSO = {"profile": ["--rows", "8"]}  # flags of one alone
HEAD = """# Results

Ours against plain code in one process, in the order A B B A: medians with the range, ratios taken
pair by pair. "exact" means float32 on both sides; "precision" means ours computes in less. Rows
that lose are printed like the others, goals stand beside them. `benchmarks/all.py` writes this
file; what was not run on a kind of device is "unmeasured".
"""


def run(name: str, device: str, flags: list[str]) -> str:
    """What a benchmark prints, or why it did not get that far."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", device, *flags]
    command += ALSO.get(name, [])
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    shown = " ".join(["python", *command[1:]])
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return f"`{shown}` failed: {reason}\n"
    return f"{result.stdout.strip()}\n\n`{shown}`: {time.perf_counter() - started:.0f} s\n"


def part(device: str, names: list[str], flags: list[str]) -> str:
    """A device's part of RESULTS.md, with every benchmark's output."""
    sections = []
    for name in names:
        print(f"{device}: {name} ...", flush=True)
        sections.append(f"### {name}\n\n{run(name, device, flags)}")
        print(sections[-1], flush=True)
    kind = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"## {device}: {kind}, {date.today().isoformat()}\n\n" + "\n".join(sections)


def unmeasured(device: str) -> str:
    """The part of a device that this machine lacks."""
    tables = {name: run(name, device, ["--unmeasured"]) for name in BENCHMARKS}
    sections = [f"### {name}\n\n{text.rpartition('`python')[0]}" for name, text in tables.items()]
    command = f"`python -m benchmarks.all --device {device}` fills this part"
    return f"## {device}: unmeasured\n\n{command}.\n\n" + "\n".join(sections)


def parts_of(text: str) -> dict[str, str]:
    """RESULTS.md's parts by device."""
    found = re.split(r"^## (?=cpu|cuda)", text, flags=re.MULTILINE)[1:]
    return {piece.split(":")[0]: f"## {piece.strip()}\n" for piece in found}


def main() -> None:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    options = parser.parse_args()
    device = "cuda" if options.device.startswith("cuda") else "cpu"
    flags = ["--threads", str(options.threads), "--rounds", str(options.rounds)]
    flags += ["--quick"] * options.quick
    found = part(device, options.only, flags)
    if options.quick:
        return
    parts = parts_of(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if "cuda" not in parts and device == "cpu":
        parts["cuda"] = unmeasured("cuda")
    parts[device] = found
    RESULTS.write_text(
        "\n".join([HEAD, *(parts[name] for name in sorted(parts))]), encoding="utf-8"
    )
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
