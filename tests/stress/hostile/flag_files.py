"""Files and values for drawn command lines: a tiny store, a checkpoint, a scan, prompts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from tests.helpers.layouts import slice_store
from tests.stress.runs.tiny_run import SCRIPT

# Of real runs: nothing large, long or from the network. Given last, so that they win.
TINY = (
    "--sam_model", "vit_tiny", "--sam_weight", "none", "--img_size", "32", "--device", "cpu",
    "--amp", "off", "--compile", "off", "--epochs", "1", "--batch_size", "4", "--num_workers", "0",
)  # fmt: skip


class Known(NamedTuple):
    """Values with which flags do something, in a folder of their own."""

    folder: Path
    values: dict[str, tuple[str, ...]]


def plain_environment() -> dict[str, str]:
    """This process's variables without a launcher's, and with one thread."""
    others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def make_known(folder: Path) -> Known:
    """Files that flags may name, under names without a folder, and other fitting values."""
    given = folder / "given"
    given.mkdir(parents=True)
    volume = np.random.default_rng(1).integers(-1000, 400, (12, 12, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([-2.0, -2, 3, 1])), given / "scan.nii.gz")
    prompts = {
        "good.json": '{"point": [[3, 4, 1]]}',
        "long.json": f'{{"point": [[{"9" * 401}, 4, 1]]}}',
        "longer.json": f'{{"point": [[{"9" * 5000}, 4, 1]]}}',
        "deep.json": "[" * 50_000,
        "cut.json": '{"point": [[3,',
        "text.json": "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    }
    for name, text in prompts.items():
        (given / name).write_text(text, encoding="utf-8")
    (given / "folder").mkdir()
    (given / "broken.pth").write_bytes(b"PK\x03\x04 cut short")
    files = ("scan.nii.gz", "broken.pth", "best.pth", "folder", "good.json")
    return Known(folder, {
        "predict": ("scan.nii.gz", "folder", "good.json", "nowhere"),
        "resume": ("best.pth", "best.pth", "broken.pth", "auto", "scan.nii.gz", "folder"),
        "prompts": tuple(prompts),
        "init": files, "lora_weight": files, "init_mask": files, "merge": ("folder", "."),
        "sam_weight": ("none", "broken.pth", "nowhere.pth"), "data_root": ("folder", "nowhere"),
        "export_lora": ("lora.pth", "lora.safetensors", "lora.txt", "best.pth"),
        "output_dir": ("out", "folder"), "device": ("cpu", "cuda", "mps", "auto", "gpu"),
        "window": ("-160", "240", "percentile", "liver", "240 -160"), "classes": ("a", "b"),
        "empty": ("keep", "drop", "50%"), "foreground_share": ("33%",), "ema": ("0.9",),
        "prompt_jitter": ("3", "2%"), "class_weights": ("none", "balanced", "1,2,3", "1,2"),
        "dist_url": ("env://", "tcp://127.0.0.1:1", "nowhere"), "val_fraction": ("0", "0.34"),
        "img_size": ("32", "48"), "num_workers": ("0", "1"), "seed": ("1", str(2**63 - 1)),
        "world_size": ("1", "2", "4096"), "fold": ("0", "1"),
    })  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """A tiny store, and the best.pth of a run on it among the given files."""
    slice_store(folder / "store", train=4, side=32, num_slices=4, test=1)
    command = [sys.executable, str(SCRIPT), *TINY, "--dataset", "store", "--data_root",
               str(folder / "store"), "--output_dir", str(folder / "first")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=plain_environment(), timeout=600)
    shutil.copy(folder / "first" / "best.pth", folder / "given" / "best.pth")
