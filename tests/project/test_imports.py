"""The rooms stay apart: who may import whom, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

LEAVES = ("losses", "metrics", "prompts", "schedule", "sam_vit", "unet_path", "visualize")
FLAG_READERS = {"usam/flags.py", "dataset/prepare.py", "dataset/verify.py"}


def imported(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize(("package", "other"), [("usam", "dataset"), ("dataset", "usam")])
def test_packages_do_not_import_each_other(package: str, other: str) -> None:
    assert files(package)
    for path in files(package):
        found = {name for name in imported(path) if name.split(".")[0] == other}
        assert not found, f"{path.name} imports {found}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_nothing_of_the_project(leaf: str) -> None:
    found = {name for name in imported(ROOT / "usam" / f"{leaf}.py") if name.startswith("usam.")}
    assert not found


def test_only_commands_parse_flags() -> None:
    for path in [ROOT / "u-sam.py", *files("usam"), *files("dataset")]:
        name = str(path.relative_to(ROOT))
        assert ("ArgumentParser(" in path.read_text(encoding="utf-8")) <= (name in FLAG_READERS), (
            name
        )


def test_only_the_entry_point_reads_the_command_line() -> None:
    for path in [*files("usam"), *files("dataset")]:
        assert "usam.flags" not in imported(path), path.name


def test_models_do_not_know_how_they_are_trained() -> None:
    for name in ("model", "mask_decoder", "sam_vit", "unet_path"):
        found = imported(ROOT / "usam" / f"{name}.py")
        assert not found & {"usam.engine", "usam.losses", "usam.metrics", "usam.checkpoint"}
