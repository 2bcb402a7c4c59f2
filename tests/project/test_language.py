"""What people read is plain English: phrases and forms that were replaced do not come back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

NOUNS = "process|slice|case|file|class|scan|image|epoch|window|point|box|batch|voxel|object|click"
ODD = (
    # riddles and archaic turns
    r"is told\b", r"are told\b", r"was told\b", r"\btold by\b", r"looked for anew", r"\banew\b",
    r"goes on there", r"trained otherwise", r"otherwise than", r"know nothing", r"knows? no\b",
    r"for want of", r"\bwho tests\b", r"samples a batch", r"\bbatches a step\b", r"\bas asked\b",
    r"without a farewell", r"a second name", r"see what it said", r"\bkin\b", r"\bto be told\b",
    r"\bmade afresh\b", r"\bbegun\b", r"\bperhaps for\b", r"learns little",
    r"for all that is written", r"where those meet",
    r"of everything drawn", r"prepared otherwise", r"\bat hand\b",
    # a comma before a closing "too"
    r", too[.;:,\"')]", r", too$",
    # forms that dodge singular and plural
    rf"\b(?:{NOUNS})\((?:e?s)\)",
    rf"(?<![\d.,:^x-])\b1 (?:{NOUNS})e?s\b",
)  # fmt: skip
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "weight", "chkpt")


def python_words(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of all comments and strings of a file, f-strings included."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def words() -> Iterator[tuple[str, str]]:
    """Place and text of everything a person reads in the project."""
    for top in ("u-sam.py", "usam", "dataset", "benchmarks", "figures"):
        files = [ROOT / top] if top.endswith(".py") else sorted((ROOT / top).rglob("*.py"))
        for path in files:
            for line, text in python_words(path):
                yield f"{path.relative_to(ROOT)}:{line}", text
    for name in PAGES:
        page = ROOT / name
        for path in [page] if page.is_file() else sorted(page.glob("*.md")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield f"{path.relative_to(ROOT)}:{number}", line


def test_odd_phrases_stay_out() -> None:
    odd = re.compile("|".join(ODD), flags=re.MULTILINE)
    found = [f"{place}: {match[0]!r}" for place, text in words() for match in odd.finditer(text)]
    assert not found, "\n".join(found)


def test_the_check_finds_what_it_should() -> None:
    odd = re.compile("|".join(ODD), flags=re.MULTILINE)
    for text in ("2 process(es)", "found 1 windows", "the main process is told", "saved, too."):
        assert odd.search(text), text
    for text in ("f(x)", "11 windows", "0.1 slices", "too few cases", "print(s)"):
        assert not odd.search(text), text
