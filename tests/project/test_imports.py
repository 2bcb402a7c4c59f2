"""Which folder may import which, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

# What a folder may import besides itself. Within a line, no file may import itself in a circle.
BASE = {"dataset", "usam.cli", "usam.runtime", "usam.models"}
MAY_IMPORT = {
    "dataset": set(),
    "usam.cli": set(),
    "usam.runtime": {"usam.cli", "dataset"},
    "usam.models": {"usam.cli"},
    "usam.weights": BASE,
    "usam.prediction": BASE | {"usam.weights"},
    "usam.evaluation": BASE | {"usam.weights", "usam.prediction"},
    "usam.training": BASE | {"usam.weights", "usam.prediction", "usam.evaluation"},
    "usam.planning": BASE | {"usam.weights", "usam.training"},
    "usam.serving": BASE | {"usam.weights", "usam.prediction"},
    "usam.api": BASE | {"usam.weights", "usam.prediction", "usam.serving", "usam.training"},
    "usam": {"usam.models", "usam.api"},  # the earlier import paths, and `usam.load`
}
NO_TORCH = ("usam.cli",)
FLAG_READERS = {
    "usam/cli/parser.py", "dataset/prepare/command.py", "dataset/verify/command.py",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    paths = [*(ROOT / "usam").rglob("*.py"), *(ROOT / "dataset").rglob("*.py")]
    return {_dotted(path): path for path in paths}


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every name a file imports, dotted, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows() -> Iterator[tuple[str, str]]:
    """(importing module, imported module), both of this project; a package counts as a module."""
    known = modules()
    for name, path in known.items():
        for found in imported(path) & set(known):
            # `from usam.models import lora` names the package as well: only the module counts.
            if found != name and not any(
                other.startswith(f"{found}.") for other in imported(path) & set(known)
            ):
                yield name, found


def folder_of(module: str) -> str:
    """The folder a module belongs to: dataset as one, usam's packages apart."""
    parts = module.split(".")
    if parts[0] == "dataset" or len(parts) == 1 or module in ("usam.model", "usam.model3d"):
        return parts[0]
    return ".".join(parts[:2])


def test_imports_point_one_way() -> None:
    wrong = {
        f"{name} imports {found}"
        for name, found in arrows()
        if folder_of(found) not in MAY_IMPORT[folder_of(name)] | {folder_of(name)}
    }
    assert wrong == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for name, found in arrows():
        graph[name].add(found)
    while leaves := {name for name, needed in graph.items() if not needed & set(graph)}:
        graph = {name: needed for name, needed in graph.items() if name not in leaves}
    assert graph == {}


def test_only_commands_parse_flags() -> None:
    for path in [ROOT / "u-sam.py", *modules().values()]:
        name = str(path.relative_to(ROOT))
        assert ("ArgumentParser(" in path.read_text(encoding="utf-8")) <= (name in FLAG_READERS), (
            name
        )


def test_folders_hold_three_to_sixteen_files() -> None:
    for top in ("usam", "dataset", "benchmarks", "tests"):
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
            number = len(list(folder.glob("*.py")))
            least = 1 if top == "tests" else 3
            assert least <= number <= 16, f"{folder.relative_to(ROOT)}: {number} Python files"
