"""Packs cases one by one, reuses those of an earlier run, and draws test cases."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.files import array_digest, blocks, write_json
from dataset.parallel import each_case
from dataset.prepare.sources import CaseFiles, Source, class_table
from dataset.scans.find import files_of
from dataset.scans.header import Scan, ScanHeader
from dataset.scans.orientation import geometry_difference
from dataset.scans.read import read_label
from dataset.splits import held_out, person
from dataset.store.folder import KINDS, Entry, check_class_names, link_file, map_array, shown
from dataset.text import counted


@dataclass(frozen=True)
class Job:
    """A case to pack: its files, options, output folder, and the store to reuse finished cases of.

    options: the dataclass of all that shapes the bytes of a case, see prepare.slices and volumes.
    """

    case: CaseFiles
    options: Any
    folder: Path
    before: Path

    @property
    def file(self) -> str:
        """Stem of the case's files below cases/: its id in plain characters."""
        return plain_name(self.case.id)

    def record(self, folder: Path | None = None) -> Path:
        """The file that says what a case was packed from."""
        return (folder or self.folder) / "cases" / f"{self.file}.json"

    def key(self) -> str:
        """Hex digest of all that decides a case's bytes: its two sources and the options."""
        settings = [type(self.options).__name__, asdict(self.options), self.case.channel]
        settings += [self.case.series]
        digest = hashlib.sha256(json.dumps([self.case.id, *settings], sort_keys=True).encode())
        for path in (self.case.image, self.case.label):
            for block in file_blocks(path):
                digest.update(block)
        return digest.hexdigest()


def plain_name(text: str) -> str:
    """The text with all but letters, digits, dots and dashes replaced by underscores."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).lstrip(".") or "case"


def file_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of all files of a scan, with their sizes between."""
    for file in files_of(path):
        yield f"\0{file.stat().st_size}\0".encode()
        yield from blocks(file)


def check_jobs(source: Source, jobs: Sequence[Job], test_fraction: float) -> None:
    """Checks everything that can be checked before the first case is packed.

    Raises FileNotFoundError without any job, ValueError for two cases of one id or file name, for
    class names that cannot be kept and for test cases to draw where the source has some.
    """
    if not jobs:
        raise FileNotFoundError("no case has both an image and a label")
    if source.classes:
        check_class_names([row["name"] for row in source.classes], source.name)
    if test_fraction and any(job.case.split == "test" for job in jobs):
        raise ValueError(f"{source.name}: has test cases of its own; leave out --test_fraction")
    for kind, names in (
        ("id", [job.case.id for job in jobs]),
        ("file", [job.file for job in jobs]),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            first = [job for job in jobs if twice[0] in (job.case.id, job.file)][:2]
            places = " and ".join(str(job.case.image) for job in first)
            raise ValueError(f"two cases of one {kind} {twice[0]!r}: {places}")


def pack_all(work: Callable[[Any], Entry], jobs: Sequence[Any], workers: int) -> list[Entry]:
    """Entries of all cases, sorted by file name; all cases are tried before an error is raised."""
    entries, faults = [], []
    for job, result in each_case(work, jobs, workers=workers, title="preparing"):
        if isinstance(result, Exception):
            faults.append((job.file, str(result)))
        else:
            entries.append(result)
    if faults:
        lines = "\n".join(f"  {text}" for _, text in sorted(faults))
        raise ValueError(
            f"{len(faults)} of {counted(len(jobs), 'case')} cannot be packed; correct or remove"
            f" them and run again, finished cases are kept:\n{lines}"
        )
    return sorted(entries, key=lambda entry: entry["file"])


def finished_case(job: Job, key: str) -> Entry | None:
    """The entry of a case packed before from the same bytes; its arrays are reused.

    None if there is no such case, or if its arrays are not those that its record names.
    """
    for folder in (job.folder, job.before):
        try:
            held = json.loads(job.record(folder).read_bytes())
            entry = held["entry"]
            if held["key"] != key:
                continue
            dtypes = entry.get("dtype", "uint8"), "uint8"
            files = [job.record(folder).with_suffix(f".{kind}.npy") for kind in KINDS]
            for kind, file, dtype in zip(KINDS, files, dtypes, strict=True):
                array = map_array(file, tuple(entry["shape"]), dtype)
                if array_digest(array) != entry["digests"][kind]:
                    raise ValueError(f"{file}: not the array of its record")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if folder != job.folder:
            job.record().parent.mkdir(exist_ok=True)
            for file in [*files, job.record(folder)]:
                target = job.record().with_name(file.name)
                target.unlink(missing_ok=True)
                link_file(file, target)
        return entry
    return None


def finish_case(job: Job, key: str, entry: Entry) -> Entry:
    """The entry, after recording what it was packed from."""
    write_json(job.record(), {"key": key, "entry": entry}, indent=None)
    return entry


def keep_only(folder: Path, entries: Sequence[Entry]) -> None:
    """Removes files that an interrupted run left of other cases."""
    ends = [f".{kind}.npy" for kind in KINDS] + [".json"]
    ours = {f"{entry['file']}{end}" for entry in entries for end in ends}
    for path in (folder / "cases").iterdir():
        if path.name not in ours:
            path.unlink()


def label_on(case: CaseFiles, image: ScanHeader, num_classes: int | None, trusted: bool) -> Scan:
    """The label of a case, as stored; with the image's header if its own is not `trusted`.

    Raises ValueError for ids outside the class table, see labels.check_label_ids, and for a label
    that does not lie on its image.
    """
    label = read_label(case.label, num_classes)
    if trusted:
        difference = geometry_difference(image, label.header)
        if difference:
            raise ValueError(
                f"{case.label}: does not lie on {case.image.name}: {difference};"
                " --ignore_label_affine trusts the order of the voxels"
            )
        return label
    if label.array.shape != image.shape:
        raise ValueError(
            f"{case.label}: shape {label.array.shape} is not the image's {image.shape}"
        )
    return Scan(label.array, image)


def classes_or_numbers(source: Source, entries: Sequence[Entry]) -> list[Entry]:
    """The source's class table; if the labels have no names, class 1 to the highest id."""
    if source.classes:
        return source.classes
    highest = 0
    for entry in entries:
        found = entry["boxes"] if "boxes" in entry else shown(entry)
        highest = max([highest, *map(int, found)])
    if not highest:
        raise ValueError("no label holds anything but background")
    return class_table([f"class {number}" for number in range(1, highest + 1)])


def shows(entries: Sequence[Entry], split: str) -> dict[str, set[int]]:
    """The classes that each case of a split shows, by patient in volumes and by id in slices."""
    found: dict[str, set[int]] = {}
    for entry in entries:
        if entry["split"] == split:
            found.setdefault(person(entry), set()).update(shown(entry))
    return found


def with_test_cases(entries: Sequence[Entry], fraction: float, seed: int) -> list[Entry]:
    """The entries, with a share of the training cases drawn for testing; see splits.held_out."""
    training = shows(entries, "train")
    testing = held_out(training, fraction, seed, training)
    return [{**e, "split": "test"} if person(e) in testing else e for e in entries]


def sources_digest(entries: Sequence[Entry]) -> str:
    """Hex digest of what all cases were packed from."""
    return hashlib.sha256("".join(entry["source"] for entry in entries).encode()).hexdigest()
