"""Headers with one changed field: read as by an independent reader, remarked on, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.stress import headers
from tests.stress.headers import all_cases, judged
from tests.stress.scans.cases import Case

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_header_is_read_as_it_is_or_not_without_a_word(tmp_path: Path, case: Case) -> None:
    assert judged(case, tmp_path) == ""


def test_the_cases_are_as_many_as_promised() -> None:
    numbers = {kind: sum(case.name.startswith(kind) for case in CASES)
               for kind in ("NIfTI", "DICOM", "NRRD", "MetaImage")}  # fmt: skip
    assert numbers["NIfTI"] >= 60
    assert numbers["DICOM"] >= 60
    assert numbers["NRRD"] + numbers["MetaImage"] >= 20
    assert sum(case.sound for case in CASES) >= 40


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda scan: scan.affine.__setitem__((0, 3), scan.affine[0, 3] + 1), "elsewhere"),
        (lambda scan: scan.array.__setitem__((0, 0, 0), 99), "other values"),
    ],
)
def test_the_judge_finds_a_careless_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, wanted: str
) -> None:
    read = headers.read_scan

    def careless(path: Path) -> object:
        scan = read(path)
        scan.array.setflags(write=True)
        change(scan)
        return scan

    monkeypatch.setattr(headers, "read_scan", careless)
    plain = next(case for case in CASES if case.name == "DICOM plain")
    assert wanted in judged(plain, tmp_path)


def test_the_judge_finds_a_misplaced_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = headers.write_label_map

    def careless(path: Path, label: np.ndarray, header: object) -> None:
        affine = header.affine + np.eye(4)[:, [3, 3, 3, 0]] * 2
        write(path, label, replace(header, affine=affine, nifti=None))

    monkeypatch.setattr(headers, "write_label_map", careless)
    plain = next(case for case in CASES if case.name == "NIfTI plain")
    assert "from its scan" in judged(plain, tmp_path)
