"""Fixtures every room's tests share: recorded numbers and, where present, real scans.

Recorded numbers ship in tests/data; real scans are looked for and skipped when missing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

# One thread here and in every process a test starts: sums come out alike to the last bit, and
# forked children meet no thread pool that did not survive the fork.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers.layouts import slice_store  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Folder of the recorded reference numbers (tests/data)."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans: $USAM_TEST_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("USAM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans under {folder}; set USAM_TEST_DATA")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn store of six training and two test cases, for a module to train on."""
    return slice_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def keep_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`after-1` beside a run's folder holds what was there after the first epoch."""
    from usam.training.checkpoint import CheckpointWriter

    save = CheckpointWriter.save

    def save_and_copy(self: CheckpointWriter, state: Any, *, as_best: bool, may_skip: bool) -> None:
        save(self, state, as_best=as_best, may_skip=False)
        self.finish()
        if len((self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1:
            shutil.copytree(self.folder, self.folder.with_name("after-1"))

    monkeypatch.setattr(CheckpointWriter, "save", save_and_copy)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork and train in the child come first: no fork may follow a backward pass."""
    items.sort(
        key=lambda item: item.path.stem not in ("test_faults", "test_security", "test_stress")
    )
