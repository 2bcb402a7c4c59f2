"""Whether README.md and docs/ describe the files that a run writes."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def assert_described(folder: Path, *, names: tuple[str, ...] = ()) -> None:
    """Every file below `folder` stands in a table of a page, by its path or by its folder.

    names: of scans; the pages write NAME for them. A folder stands for its files only where the
    tables name none of them.
    """
    rows = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    cells = [row.split("|")[1] for row in rows if row.startswith("|")]
    known = {span for cell in cells for span in re.findall(r"`([^`]+)`", cell)}
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert files
    for file in files:
        path = file.as_posix()
        for name in names:
            if file.name.startswith(name):
                path = path.replace(name, "NAME", 1)
        parent = f"{Path(path).parent.as_posix()}/"
        listed = any(span.startswith(parent) and span != parent for span in known)
        assert path in known or (parent in known and not listed), f"{path} is not described"
