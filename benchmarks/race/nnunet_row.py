"""The row of nnU-Net v2 through its own commands, 2D, on the original scans.

Its plan is its own but for the batch, which is that of the other rows: the planned one, made for a
GPU, would leave a few steps in minutes on a core. Planning and preprocessing do not count as time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.race.data import prepare
from benchmarks.race.rows import BATCH, Run
from benchmarks.race.scores import Labels
from dataset.scans.find import scan_stem

DATASET, TRAINER = "Dataset501_Race", "RaceTrainer"
CONFIGURATION = "2d_race"
ENDS = {"test": "Ts", "val": "Val"}
TO_PREPARE, TO_SAVE, TO_PREDICT = 900, 180, 1500  # seconds


def train(run: Run, data: Path, folder: Path, programs: Path) -> dict[str, Any]:
    """Train for run.minutes, from the start of the command; seconds, steps and epochs."""
    home = data / "nnunet"
    plan(data / "raw", home, programs)
    trainers = folder / "trainers"
    trainers.mkdir()
    shutil.copy(Path(__file__).with_name("nnunet_trainer.py"), trainers)
    seconds, start = run.minutes * 60, time.time()
    variables = environment(home, folder) | {
        "RACE_DEADLINE": str(start + seconds), "RACE_SECONDS": str(seconds),
    }  # fmt: skip
    command = [programs / "nnUNetv2_train", DATASET, CONFIGURATION, "0", "-tr", TRAINER]
    call([*command, "-device", "cpu"], variables, folder, seconds + TO_SAVE)
    model = folder / "results" / DATASET / f"{TRAINER}__nnUNetPlans__{CONFIGURATION}" / "fold_0"
    facts = json.loads((model / "race.json").read_text(encoding="utf-8"))
    if not facts["steps"]:
        raise RuntimeError(f"no step within {seconds:.0f} s; give more --minutes")
    return {"seconds": round(time.time() - start, 1), **facts}


def predict(run: Run, data: Path, folder: Path, programs: Path) -> Labels:
    """nnU-Net's labels of the split, turned as the store's slices are by the store's own command.

    Raises ValueError in the scorer where a case is missing.
    """
    home, end = data / "nnunet", ENDS[run.split]
    asked, answered = folder / "asked", folder / "layout" / f"labels{end}"
    answered.mkdir(parents=True)
    link_images(data / "raw" / f"images{end}", asked)
    command = [programs / "nnUNetv2_predict", "-i", asked, "-o", answered, "-d", DATASET]
    command += ["-c", CONFIGURATION, "-f", "0", "-tr", TRAINER, "-device", "cpu"]
    command += ["-npp", "1", "-nps", "1"]
    call(command, environment(home, folder), folder, TO_PREDICT)
    (folder / "layout" / f"images{end}").symlink_to(data / "raw" / f"images{end}")
    shutil.copy(data / "raw" / "dataset.json", folder / "layout")
    store = prepare(folder / "layout", folder / "answers")
    return {case["id"]: np.array(store.arrays(n)[1]) for n, case in enumerate(store.cases)}


def plan(raw: Path, home: Path, programs: Path) -> None:
    """Convert, plan and preprocess once, with the race's own split."""
    target, done = home / "raw" / DATASET, home / "planned"
    if done.is_file():
        return
    shutil.rmtree(home, ignore_errors=True)
    split = {}
    for key, end in (("train", "Tr"), ("val", "Val")):
        split[key] = link_images(raw / f"images{end}", target / "imagesTr")
        (target / "labelsTr").mkdir(exist_ok=True)
        for label in (raw / f"labels{end}").iterdir():
            (target / "labelsTr" / label.name).symlink_to(label.resolve())
    table = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    table["numTraining"] = len(split["train"]) + len(split["val"])
    (target / "dataset.json").write_text(json.dumps(table), encoding="utf-8")
    command = [programs / "nnUNetv2_plan_and_preprocess", "-d", DATASET[7:10], "-c", "2d"]
    variables = environment(home, home) | {"nnUNet_n_proc_DA": "1"}  # planning refuses 0
    call([*command, "-np", "1", "-npfp", "1"], variables, home, TO_PREPARE)
    prepared = home / "preprocessed" / DATASET
    (prepared / "splits_final.json").write_text(json.dumps([split]), encoding="utf-8")
    plans = json.loads((prepared / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["configurations"][CONFIGURATION] = {"inherits_from": "2d", "batch_size": BATCH}
    (prepared / "nnUNetPlans.json").write_text(json.dumps(plans), encoding="utf-8")
    done.touch()


def link_images(images: Path, target: Path) -> list[str]:
    """Links to the scans of a folder with nnU-Net's names; the cases, sorted."""
    target.mkdir(parents=True, exist_ok=True)
    cases = []
    for image in sorted(images.iterdir()):
        if not image.name.endswith(".nii.gz"):
            raise ValueError(f"nnunet: {image}: expected .nii.gz files; leave the row out")
        cases.append(scan_stem(image).removesuffix("_0000"))
        (target / f"{cases[-1]}_0000.nii.gz").symlink_to(image.resolve())
    return cases


def environment(home: Path, folder: Path) -> dict[str, str]:
    """The variables that nnU-Net reads; results and the trainer are the run's own."""
    return os.environ | {
        "nnUNet_raw": str(home / "raw"), "nnUNet_preprocessed": str(home / "preprocessed"),
        "nnUNet_results": str(folder / "results"), "nnUNet_extTrainer": str(folder / "trainers"),
        "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f",
    }  # fmt: skip


def call(words: list[Any], variables: dict[str, str], folder: Path, seconds: float) -> None:
    """Run a command of nnU-Net; RuntimeError naming its output if it fails or does not end."""
    log = folder / "nnunet.txt"
    with log.open("a", encoding="utf-8") as text:
        process = subprocess.Popen(
            [str(word) for word in words], stdout=text, stderr=text, env=variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with its workers
            process.wait()
            code = f"no end within {seconds:.0f} s"
    if code:
        raise RuntimeError(f"{Path(words[0]).name} failed ({code}), see {log}")
