"""The rows of the race and the settings that decide whether a finished run is the same one."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
USAM, UNET, NNUNET = "u-sam", "unet", "nnunet"  # how a row is trained
FORWARD = 1 / 3  # of a training step's time that a slice costs in validation, until it is measured
BATCH = 8  # slices a step, of all rows but those of --recipe auto
# From random weights: the rates that --dataset phantom takes by default.
TINY = "--sam_model vit_tiny --sam_weight none --lr 8e-4 --lr_vit 4e-5 --lr_backbone 1e-3 --warmup"
REAL = "--sam_model vit_t --img_size 128 --recipe strong --warmup"  # LiteMedSAM's file, if found


@dataclass(frozen=True)
class Row:
    """A line of the table. flags: of u-sam.py, or for a U-Net its network and augmentation."""

    name: str
    kind: str
    flags: tuple[str, ...] = ()
    title: str = ""
    one_seed: bool = False

    @property
    def is_peer(self) -> bool:
        """Whether the row is what a user would pick instead."""
        return self.kind != USAM


def usam_row(name: str, flags: str, title: str = "") -> Row:
    """A row that u-sam.py trains with `flags`, a line as in a shell."""
    return Row(name, USAM, tuple(shlex.split(flags)), title or f"U-SAM, {name}")


ROWS = (
    usam_row("published", f"{TINY} --recipe published", "U-SAM `vit_tiny`, published"),
    usam_row("strong", f"{TINY} --recipe strong", "U-SAM `vit_tiny`, strong"),
    usam_row("auto", "--recipe auto --budget {minutes}m", "U-SAM, auto"),
    usam_row(
        "lite-decoder",
        f"{REAL} --tuning decoder --cache_embeddings",
        "U-SAM `vit_t`, LiteMedSAM's weights, decoder on cached embeddings",
    ),
    usam_row("lite-lora", f"{REAL} --tuning lora", "U-SAM `vit_t`, LiteMedSAM's weights, LoRA"),
    usam_row("lite-full", f"{REAL} --tuning full", "U-SAM `vit_t`, LiteMedSAM's weights, full"),
    usam_row("vit_t-random", f"{REAL} --sam_weight none", "U-SAM `vit_t`, random weights"),
    Row("unet-published", UNET, ("basic", "published"), "MONAI BasicUNet, published augmentation"),
    Row("unet-strong", UNET, ("basic", "strong"), "MONAI BasicUNet, strong augmentation"),
    Row("resunet-strong", UNET, ("residual", "strong"), "MONAI UNet, strong augmentation"),
    Row("nnunet", NNUNET, (), "nnU-Net v2, 2D", one_seed=True),
)


@dataclass(frozen=True)
class Run:
    """One training of a row on a data set, and the split that scores it.

    store: digest of the prepared data. img_size: pixels, where the row's flags name none.
    """

    data: str
    store: str
    row: Row
    seed: int
    minutes: float
    split: str
    img_size: int
    cores: int

    @property
    def name(self) -> str:
        """Name of its folder and, with .json, of its result."""
        cores = "" if self.cores == 1 else f"-{self.cores}cores"
        time = f"{self.minutes:g}min{cores}"
        return f"{self.data}-{self.row.name}-{time}-{self.split}-{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result but the code, as JSON gives it back."""
        facts = asdict(self)
        del facts["row"]["title"]
        return json.loads(json.dumps(facts))


def usam_flags(run: Run, store: Path, folder: Path) -> list[str]:
    """The flags of u-sam.py for a row; `auto` plans size and batch itself."""
    given = [word.replace("{minutes}", f"{run.minutes:g}") for word in run.row.flags]
    flags = ["--dataset", "store", "--data_root", str(store), "--output_dir", str(folder)]
    flags += ["--seed", str(run.seed), "--num_workers", "0", "--device", "cpu", *given]
    if "--budget" not in given:
        common = {"--img_size": run.img_size, "--batch_size": BATCH}
        flags += [str(w) for pair in common.items() if pair[0] not in given for w in pair]
    return flags


def is_done(path: Path, run: Run, commit: str | None) -> bool:
    """Whether `path` holds the result of the same settings and commit (None: of any commit)."""
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found["settings"] == run.settings()
    return same and commit in (None, found["commit"])


def runs_of(
    rows: Iterable[Row], data: dict[str, dict[str, Any]], seeds: list[int], **common: Any
) -> list[Run]:
    """All runs, seed by seed, so that an early look compares all rows."""
    return [
        Run(name, facts["digest"], row, seed, img_size=facts["img_size"], **common)
        for seed in seeds
        for name, facts in data.items()
        for row in rows
        if not (row.one_seed and seed != seeds[0])
    ]


def commit() -> str:
    """The commit of the code; with what differs from it, if anything that runs does."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("diff", "HEAD", "--", "*.py")
    changed = f"+{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else ""
    return git("rev-parse", "--short=12", "HEAD") + changed
