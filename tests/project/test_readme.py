"""What README.md tells people to type is understood, and its table of flags is complete."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.conftest import ROOT
from usam.cli import parser
from usam.cli.flags import FLAGS


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


LAUNCHES = re.compile(
    r"(?:python3? u-sam\.py"
    r"|(?:python3? -m torch\.distributed\.(?:launch|run)|torchrun) .*?u-sam\.py"
    r"|bash train_sam\.sh)(?: (.*))?"
)


def test_every_command_of_the_readme_parses() -> None:
    text = "\n".join(code_blocks((ROOT / "README.md").read_text(encoding="utf-8"))).replace(
        "\\\n", " "
    )
    starts = ("python u-sam.py", "python -m torch.distributed", "torchrun", "bash train_sam.sh")
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith(starts)]
    found = {start for start in starts for command in commands if command.startswith(start)}
    assert found >= set(starts) - {"torchrun"}
    for command in commands:
        match = LAUNCHES.fullmatch(command.partition(" #")[0].strip())
        assert match, command
        try:
            parser.parse_flags(shlex.split(match[1] or ""))
        except SystemExit:
            pytest.fail(f"README.md: {command}")


def test_the_readmes_table_lists_every_flag_and_no_other() -> None:
    section = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("\n## Flags\n")[2]
        .partition("\n## ")[0]
    )
    cells = re.findall(r"^\|([^|]*)\|", section, flags=re.MULTILINE)
    listed = re.findall(r"`(--\w+)", " ".join(cells))
    assert sorted(listed) == sorted(f"--{flag.name}" for flag in FLAGS)
