"""docs/flags.md, written from the rows of flags: python -m usam.cli > docs/flags.md."""

from __future__ import annotations

from usam.cli.choices import DATASET_DEFAULTS
from usam.cli.flags import FLAGS, MED3D, USAM, Flag
from usam.cli.parser import EXIT_CODES, HINTS, default_text

INTRODUCTION = """# Flags of u-sam.py

`python u-sam.py --help` prints the same. Where two defaults stand, the second is that of
`--model sam-med3d`. Flags cannot be abbreviated. This page is written by
`python -m usam.cli > docs/flags.md` from the rows in `usam/cli/flags.py`.

The last column says what `--resume` does with a flag that is not given:

- *model*: taken from the checkpoint in every run, as it describes the model; another value is
  refused.
- *decisive*: training takes it from the checkpoint; another value changes the result and needs
  `--override`.
- *kept*: training takes it from the checkpoint; another value may be given.
- empty: not taken from the checkpoint.
"""
HEADER = "| flag | values | default | meaning | with --resume |\n| --- | --- | --- | --- | --- |"


def flags_page() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION]
    for group in dict.fromkeys(flag.group for flag in FLAGS):
        rows = [_row(flag) for flag in FLAGS if flag.group == group]
        parts.append("\n".join([f"## {group.capitalize()}\n", HEADER, *rows, ""]))
    parts.append(
        f"## Removed\n\n`--focal_gamma`: {HINTS['focal_gamma']}. `--patience`: "
        f"{HINTS['patience']}. Checkpoints that were trained with one of them switched on can be "
        "evaluated and predicted with; resuming their training needs `--override`.\n"
    )
    for name, values in DATASET_DEFAULTS.items():
        words = " ".join(
            f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in values.items()
        )
        parts.append(
            f"## Defaults of --dataset {name}\n\nA new training without `--recipe` uses `{words}` "
            "where these flags are not given.\n"
        )
    parts.append(f"## Exit codes\n\n{EXIT_CODES.removeprefix('Exit codes: ')}\n")
    return "\n".join(parts)


def _row(flag: Flag) -> str:
    if flag.type is None:
        values = ""
    elif flag.choices:
        values = ", ".join(f"`{choice}`" for choice in flag.choices)
    else:
        names = flag.metavar or flag.name.upper()
        values = f"`{names if isinstance(names, str) else ' '.join(names)}`"
        values += " ..." if flag.nargs == "+" else ""
    runs = " and ".join(f"`--{run}`" for run in flag.runs)
    only = f"{flag.model} only" if flag.model in (USAM, MED3D) else ""
    scope = ", ".join(part for part in (only, runs) if part)
    meaning = f"({scope}) {flag.help}" if scope else flag.help
    cells = (f"`--{flag.name}`", values, default_text(flag), meaning, flag.resume)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
