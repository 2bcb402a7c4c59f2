"""Every kind of file the project reads: a good one, how it is read, and how a hostile one is made.

tests.stress.files breaks the good ones by the thousand and offers them to the readers.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from dataset.care import read_boxes, read_slice
from dataset.prepare.sources import find_nnunet
from dataset.scans.orientation import to_canonical
from dataset.scans.read import read_label, read_scan
from tests.helpers.toy import FLOAT32, one_group
from tests.stress.hostile import mutations
from tests.stress.hostile import payloads as hostile
from tests.stress.hostile.stores import (
    made_in_memory,
    make_nnunet,
    make_slices,
    make_volumes,
    read_slices,
    read_volumes,
    verified,
)
from tests.stress.saves import small_model, small_state
from usam.models.sam_med3d import build_sam_med3d
from usam.models.usam import build_usam
from usam.prediction.prompts import read_prompts, slice_prompts_of, volume_prompts_of
from usam.training.checkpoint import TrainingState, checkpoint_errors
from usam.training.ema import WeightAverage
from usam.weights.sam_med3d import load_sam_med3d_checkpoint
from usam.weights.state_dict import load_model_state
from usam.weights.torch_files import read_tensors
from usam.weights.usam import read_checkpoint

Break = Callable[[random.Random, Path], bytes]


@dataclass
class Kind:
    """A kind of file. place: where it lies below a folder that `make` fills with all it needs.

    good: its bytes. read: the project's reader, given that folder. special: makers of hostile
    copies, from random numbers and the canary's path.
    """

    name: str
    place: str
    good: bytes
    read: Callable[[Path], Any]
    special: tuple[Break, ...] = ()
    make: Callable[[Path], None] = lambda folder: None

    def broken(self, draw: random.Random, canary: Path) -> bytes:
        """A broken copy: hostile in half of the cases, otherwise damaged."""
        if self.special and draw.random() < 0.5:
            return draw.choice(self.special)(draw, canary)
        return mutations.broken(self.good, draw)


def all_kinds() -> list[Kind]:
    """Every kind; its good file is made here, so nothing of it is drawn at random."""
    return [*checkpoints(), *slices_of_care(), *arrays(), *scans(), *tables(), *indexes()]


# ------------------------------------------------------------------ checkpoints


def checkpoints() -> list[Kind]:
    """Our own, published ones of U-SAM and SAM-Med3D, and SAM's official weights."""
    ours = small_state(3)
    ours["data"] = {
        "classes": ["background", "a", "b"], "img_size": 32, "window": [-160, 240],
        "orientation": "LPS", "spacing": None, "crop": 0.0, "prompt_mode": 3, "colors": ["#000000"],
    }  # fmt: skip
    args = argparse.Namespace(lr=1e-3, prompt_mode=0, output_dir="x")
    shapes = build_usam("vit_tiny", num_classes=3, img_size=32).state_dict()
    published = {"model": stretched(shapes), "args": args, "epoch": 3}
    volumes = stretched(build_sam_med3d("vit_tiny").state_dict())
    turbo = {"model_state_dict": volumes, "args": args, "epoch": 3, "losses": [1.0]}
    official = {f"image_encoder.{n}": torch.zeros(3, 4) for n in range(20)}
    return [
        _checkpoint("checkpoint", ours, taken_up),
        _checkpoint("published checkpoint", published, read_checkpoint),
        _checkpoint("SAM-Med3D's weights", turbo, load_sam_med3d_checkpoint),
        _checkpoint("SAM's weights", official, read_tensors),
    ]


def taken_up(path: Path) -> dict[str, Any]:
    """Our checkpoint as a run takes it up: weights, optimizer, random state, position."""
    saved, model = read_checkpoint(path), small_model(0)
    load_model_state(model, saved["model"], path)
    average = WeightAverage(model, 0.0)
    state = TrainingState(model, one_group(model), FLOAT32.scaler(), average, facts={})
    with checkpoint_errors(path):
        state.load_state_dict(saved)
    return vars(state.progress) | state.best


def stretched(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes that are stored as one number each."""
    return {name: torch.zeros((), dtype=v.dtype).expand(v.shape) for name, v in state.items()}


def saved(content: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _checkpoint(name: str, content: dict[str, Any], read: Callable[[Path], Any]) -> Kind:
    good = saved(content)
    code = zip_member(good, "data.pkl")

    def other_content(draw: random.Random, canary: Path) -> bytes:
        return saved(mutations.replaced(content, draw))

    def other_pickle(make: Callable[[Path, random.Random], bytes]) -> Break:
        return lambda draw, canary: with_member(good, "data.pkl", make(canary, draw))

    return Kind(
        name,
        "file.pth",
        good,
        lambda folder: read(folder / "file.pth"),
        (
            other_pickle(hostile.pickles),
            other_pickle(hostile.memory_pickles),
            other_pickle(lambda canary, draw: mutations.broken(code, draw)),
            other_content,
            lambda draw, canary: hostile.pickles(canary, draw),  # torch 1.5's format: no zip
            lambda draw, canary: saved({"model": hostile.Call(print, "x"), "args": {}, "data": {}}),
            lambda draw, canary: hostile.zip_bombs("archive/data.pkl", draw),
        ),
    )


def zip_member(data: bytes, ending: str) -> bytes:
    """The member of a zip whose name ends so."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name)


def with_member(data: bytes, ending: str, content: bytes) -> bytes:
    """The same zip with other bytes in one member, checksums and all."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            own = content if member.filename.endswith(ending) else old.read(member)
            new.writestr(zipfile.ZipInfo(member.filename), own, member.compress_type)
    return stream.getvalue()


# ------------------------------------------------------------------ arrays and scans


def slices_of_care() -> list[Kind]:
    """An npz of the release, as packing and as prediction read it."""
    stream = io.BytesIO()
    image = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    np.savez(stream, image=image, label=(image > 0.5).astype(float))
    good = stream.getvalue()

    def other_array(draw: random.Random, canary: Path) -> bytes:
        name = draw.choice(("image.npy", "label.npy"))
        made = hostile.npy_headers(canary, draw)
        if draw.random() < 0.5:
            made = mutations.broken(zip_member(good, name), draw)
        return with_member(good, name, made)

    def bomb(draw: random.Random, canary: Path) -> bytes:
        return hostile.zip_bombs(draw.choice(("image.npy", "label.npy")), draw)

    place, special = "slice.npz", (other_array, other_array, bomb)
    return [
        Kind("npz, packed", place, good, lambda f: read_slice(f / place), special),
        Kind("npz, predicted", place, good, lambda f: read_scan(f / place), special),
    ]


def arrays() -> list[Kind]:
    """The npy files of both stores."""
    made = {
        "slices": (make_slices, read_slices, np.zeros((3, 16, 16), np.uint8)),
        "volumes": (make_volumes, read_volumes, np.zeros((8, 8, 8), np.int16)),
    }
    kinds = []
    for name, (make, read, array) in made.items():
        stream = io.BytesIO()
        np.save(stream, array)
        special = (lambda draw, canary: hostile.npy_headers(canary, draw),)
        kinds.append(
            Kind(f"npy of {name}", "cases/a.image.npy", stream.getvalue(), read, special, make)
        )
    stream = io.BytesIO()
    np.save(stream, np.zeros((3, 16, 16), np.uint8))
    special = (lambda draw, canary: hostile.npy_headers(canary, draw),)
    place = "cases/a.mask.npy"
    return [*kinds, Kind("npy mask", place, stream.getvalue(), read_slices, special, make_slices)]


def scans() -> list[Kind]:
    """NIfTI as image and as label, plain and packed."""
    image = nib.Nifti1Image(
        np.arange(256, dtype=np.int16).reshape(8, 8, 4) % 4, np.diag([2, 2, 3, 1])
    )
    good = image.to_bytes()

    def scan(path: Path) -> Any:
        return to_canonical(read_scan(path))

    def header(draw: random.Random, canary: Path) -> bytes:
        return hostile.nifti_headers(good, draw)

    def packed(make: Break) -> Break:
        return lambda draw, canary: gzip.compress(make(draw, canary), 1)

    def damaged(draw: random.Random, canary: Path) -> bytes:
        return mutations.broken(good, draw)

    def bomb(draw: random.Random, canary: Path) -> bytes:
        return hostile.gzip_bombs(hostile.nifti_headers(good, draw)[:352])

    inside = (packed(header), packed(header), packed(damaged), packed(damaged), bomb)
    zipped = gzip.compress(good, 1, mtime=0)
    return [
        Kind("NIfTI", "a.nii", good, lambda f: scan(f / "a.nii"), (header,)),
        Kind("NIfTI, packed", "a.nii.gz", zipped, lambda f: scan(f / "a.nii.gz"), inside),
        Kind("NIfTI label", "a.nii", good, lambda f: read_label(f / "a.nii", 4), (header,)),
        Kind("NIfTI file", "a.nii.gz", zipped, lambda f: read_scan(f / "a.nii.gz"), inside),
    ]


# ------------------------------------------------------------------ text


def tables() -> list[Kind]:
    """CARE's CSV, prompts for both models, nnU-Net's dataset.json."""
    rows = "name,bbox\n" + "".join(f'case1_slice{k},"[1, 2, 3, 4]"\n' for k in range(20))
    boxes = [{"slice": 2, "box": [1, 2, 3, 4]}]
    prompts = {"points": [[1, 2, 3], [4, 5, 6, 0]], "mm": False, "boxes": boxes}
    objects = {
        "objects": [
            {"name": "liver", "label": 1, "points": [[9, 8, 4], [6, 7, 4, 0]]},
            {"name": "spleen", "label": 2, "box": [2, 6, 3, 5, 9, 5]},
        ],
        "mm": False,
    }
    many = {"scans": {"x.nii.gz": prompts, "y.nii.gz": {"points": []}}}
    table = {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 2, "file_ending": ".nii.gz",
    }  # fmt: skip
    return [
        Kind(
            "CSV", "boxes.csv", rows.encode(), lambda f: read_boxes(f / "boxes.csv"),
            (lambda draw, canary: hostile.csv_rows(canary, draw),),
        ),
        json_kind("prompts", "p.json", prompts, lambda f: prompts_of_x(slice_prompts_of, f)),
        json_kind("many prompts", "p.json", many, lambda f: prompts_of_x(slice_prompts_of, f)),
        json_kind("clicks", "p.json", objects, lambda f: prompts_of_x(volume_prompts_of, f)),
        json_kind("dataset.json", "dataset.json", table, find_nnunet, make=make_nnunet),
    ]  # fmt: skip


def prompts_of_x(of_scan: Callable[..., Any], folder: Path) -> Any:
    """What p.json has for the scan x.nii.gz beside y.nii.gz, or alone if it is of one scan."""
    file, scans = folder / "p.json", [Path("x.nii.gz"), Path("y.nii.gz")]
    try:
        contents = read_prompts(file, scans)
    except ValueError as error:
        if "of one scan" not in str(error):
            raise
        contents = read_prompts(file, scans[:1])
    return of_scan(argparse.Namespace(prompts=file, lps=False), contents, scans[0])


def json_kind(
    name: str,
    place: str,
    content: Any,
    read: Callable[[Path], Any],
    *,
    make: Callable[[Path], None] = lambda folder: None,
) -> Kind:
    """A kind of JSON file with the given content."""

    def other_values(draw: random.Random, canary: Path) -> bytes:
        return json.dumps(mutations.replaced(content, draw)).encode()

    special = (other_values, other_values, lambda draw, canary: hostile.json_texts(canary, draw))
    return Kind(name, place, json.dumps(content).encode(), read, special, make)


def indexes() -> list[Kind]:
    """The indexes of both stores, and the table of splits beside one, as `verify` reads it."""
    index = made_in_memory(make_slices, "index.json")
    volumes = made_in_memory(make_volumes, "index.json")
    splits = made_in_memory(make_slices, "splits.json")
    return [
        json_kind("index of slices", "index.json", index, read_slices, make=make_slices),
        json_kind("index of volumes", "index.json", volumes, read_volumes, make=make_volumes),
        json_kind("splits", "splits.json", splits, verified, make=make_slices),
        json_kind("index, verified", "index.json", index, verified, make=make_slices),
    ]
