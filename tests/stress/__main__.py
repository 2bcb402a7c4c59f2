"""The full counts by one command: python -m tests.stress [PART ...] [--sample], a table in the end.

Ends with 1 if a figure is not as wanted.
"""

from __future__ import annotations

import os

# Before anything computes: forked children must not wait for threads that did not come along.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402

from tests.stress.rows import Row, machine, summary  # noqa: E402

PARTS = ("saves", "files", "counts", "ranks", "resume", "cost", "headers", "flags", "prepare")


def main() -> int:
    """Run the parts that are named, or all; print each row as it is done."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--sample", action="store_true", help="smaller counts")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    started = time.monotonic()
    rows: list[Row] = []
    print(machine(), flush=True)
    for part in args.parts or PARTS:
        for row in importlib.import_module(f"tests.stress.{part}").run(full=not args.sample):
            rows.append(row)
            tell(row)
    faults = any(row.faults for row in rows)
    print(f"{time.monotonic() - started:.0f} s in all; {'FAULTS' if faults else 'all as wanted'}")
    return int(faults)


def tell(row: Row) -> None:
    """Print a row, and what kinds of faults it met."""
    print(row, flush=True)
    for line in summary(row.faults):
        print(f"    {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
