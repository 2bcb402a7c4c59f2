"""The examples of CONTRIBUTING.md work as written, in a copy of the project."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT


def blocks(language: str) -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def apply(block: str, root: Path) -> None:
    """Add, remove or replace lines of a file as a block of the page says."""
    first, *lines = block.splitlines()
    path = root / first.removeprefix("# ")
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{path.name}: these lines stand there not once:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all examples applied."""
    root = tmp_path_factory.mktemp("project")
    for name in ("usam", "dataset"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "u-sam.py", root)
    for block in blocks("python"):
        (root / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    for block in blocks("diff"):
        apply(block, root)
    return root


def test_the_examples_train_resume_and_evaluate(changed: Path) -> None:
    commands = [line for line in blocks("bash")[-1].splitlines() if line.startswith("python ")]
    assert len(commands) == 3
    for command in commands:
        words = [sys.executable, *shlex.split(command)[1:], "--num_workers", "0", "--device", "cpu"]
        done = subprocess.run(words, cwd=changed, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(changed / "chkpt" / "last.pth", weights_only=True)
    assert saved["progress"]["epoch"] == 2
    assert saved["args"]["tversky"] == 0.5  # kept by the resumed run
    assert saved["args"]["sam_model"] == "vit_small"
    metrics = json.loads((changed / "chkpt" / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["dice"]) == {"background", "disc"}
