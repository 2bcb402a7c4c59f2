"""README.md and the pages under docs/: every command parses, every link leads somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from dataset.prepare import command as prepare
from dataset.verify import command as verify
from tests.conftest import ROOT
from usam.cli import parser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHES = re.compile(
    r"(?:srun )?(?:python3? u-sam\.py"
    r"|(?:python3? -m torch\.distributed\.(?:launch|run)|torchrun) .*?u-sam\.py"
    r"|bash train_sam\.sh)(?: (.*))?"
)
OTHERS = {"dataset.prepare": prepare.build_parser, "dataset.verify": verify.build_parser}


def commands(page: Path) -> list[str]:
    """The commands of a page, in blocks of code and in cells of tables, one line each."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n *", "", "\n".join(blocks)).splitlines()
    lines += re.findall(r"`(python [^`]*--[^`]+)`", text)
    found = [line.strip().partition(" #")[0].rstrip("& ").strip() for line in lines]
    starts = ("python u-sam.py", "python -m dataset", "python -m torch", "torchrun", "srun", "bash")
    left_out = re.compile(r"\.\.\.|\$|--help$")  # abridged, with shell variables, or no run
    return [line for line in found if line.startswith(starts) and not left_out.search(line)]


def slug(title: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def test_the_readme_fits_its_size() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 220
    assert max(map(len, lines)) <= 120


def test_pages_hold_the_published_commands() -> None:
    found = " ".join(" ".join(commands(page)) for page in PAGES)
    for start in ("python u-sam.py", "python -m torch.distributed.launch", "torchrun", "bash"):
        assert start in found


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CONTRIBUTING.md"],  # its test runs them
    ids=lambda page: page.name,
)
def test_every_command_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: argparse.ArgumentParser, message: str) -> None:
        raise ValueError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    for command in commands(page):
        name = next((name for name in OTHERS if f"-m {name} " in f"{command} "), None)
        if name:
            words = shlex.split(command.partition(name)[2])
            OTHERS[name]().parse_args(words)
        elif match := LAUNCHES.fullmatch(command):
            parser.parse_flags(shlex.split(match[1] or ""))
        else:
            assert not command.startswith(("python u-sam.py", "torchrun")), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {
                re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles
            }
            assert anchor in slugs, f"{page.name}: {target}"


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in text
