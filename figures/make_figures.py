"""Draws the README's pictures, all but pretrained.png from data the project makes itself.

    python figures/make_figures.py --resume chkpt/phantom/best.pth --resume3d chkpt/clicks/best.pth
    python figures/make_figures.py --scan word_9002.nii.gz --labels labels/word_9002.nii.gz

phantom.png needs nothing; overlays.png needs the checkpoint of the README's first command and
volumes.png that of its SAM-Med3D training, whose --eval draws clicks.png. pretrained.png needs a
CT, its labels with WORD's ids, and LiteMedSAM's weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from dataset import build_dataset, build_volumes  # noqa: E402
from dataset.crops import normalise  # noqa: E402
from dataset.phantom import pelvis as phantom  # noqa: E402
from dataset.scans.window import apply_window  # noqa: E402
from usam.evaluation import clicks as clicks3d  # noqa: E402
from usam.evaluation.pixels import predictions  # noqa: E402
from usam.models.sam_med3d import build_sam_med3d  # noqa: E402
from usam.models.usam import build_usam  # noqa: E402
from usam.prediction.pretrained import SliceSegmenter, box_of, open_scan  # noqa: E402
from usam.runtime.figures import blend  # noqa: E402
from usam.runtime.precision import select_precision  # noqa: E402
from usam.weights import usam as weights  # noqa: E402
from usam.weights.pretrained import load_pretrained  # noqa: E402
from usam.weights.state_dict import load_model_state  # noqa: E402

COLUMNS = 4
CPU = torch.device("cpu")
ORGANS = (1, 3, 5)  # of phantom3d: liver, left kidney, aorta
PRETRAINED_ORGANS = (("liver", 1, "#ffb000"), ("spleen", 2, "#648fff"), ("stomach", 5, "#dc267f"))
MARGIN = 3  # pixels between an organ and its box


def draw_phantom(path: Path, patients: tuple[int, ...] = (10, 11, 4)) -> None:
    """Slices of some of the phantom's patients, one a row: four from the lowest up, outlined.

    Each row opens with the slice that shows most of the tumour, as a network sees it.
    """
    colors = [row["color"] for row in phantom.CLASSES]
    rows = []
    for number in patients:
        _, image, mask = phantom.draw_case("train", number)
        fullest = int((mask == 2).sum(axis=(1, 2)).argmax())
        plain = outline(image[fullest], np.zeros_like(mask[fullest]), colors)
        outlined = [outline(image[k], mask[k], colors) for k in range(1, len(image), 2)]
        rows.append(np.hstack([plain, *outlined])[28:202])
    picture = np.vstack(rows)
    figure = Figure(figsize=(picture.shape[1] / 90, picture.shape[0] / 90 + 0.4))
    axes = figure.subplots(1, 1, squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0.4 / figure.get_figheight(), top=1)
    axes[0, 0].imshow(picture, interpolation="lanczos")
    finish(figure, axes, [row["name"] for row in phantom.CLASSES], colors, path)


def outline(image: np.ndarray, mask: np.ndarray, colors: list[str]) -> np.ndarray:
    """The slice in grey with every class's inner edge in its colour.

    image, mask uint8 (H, W); colors by class id, background first. Returns float (H, W, 3).
    """
    picture = np.repeat(image[..., None] / 255, 3, axis=2)
    for label, color in enumerate(colors[1:], start=1):
        inside = np.pad(mask == label, 1)
        core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        picture[(mask == label) & ~core] = to_rgb(color)
    return picture


def draw_overlays(path: Path, resume: Path, data_root: Path | None) -> None:
    """Test slices of different cases: image, and around the rectum truth and prediction."""
    saved = weights.read_checkpoint(resume)
    size, classes = saved["data"]["img_size"], saved["data"]["classes"]
    data = build_dataset("phantom", "test", data_root=data_root, img_size=size)
    model = build_usam(saved["args"]["sam_model"], num_classes=len(classes), img_size=size)
    load_model_state(model, saved["model"], resume)
    loader = [torch.utils.data.default_collate([data[i]]) for i in data.showcase(COLUMNS)]
    precision = select_precision("off", torch.device("cpu"))
    shown = predictions(
        model, loader, prompt_mode=saved["data"]["prompt_mode"], precision=precision
    )
    figure = Figure(figsize=(2.6 * COLUMNS, 8.2), layout="constrained")
    axes = figure.subplots(3, COLUMNS)
    for column, (batch, mask, _, logits) in enumerate(shown):
        image = batch["image"][0, 0].numpy()
        axes[0, column].imshow(image, cmap="gray")
        near = around(mask[0].numpy())
        for row, labels in ((1, mask[0]), (2, logits[0].argmax(dim=0))):
            tinted = blend(image, labels.numpy(), data.info["colors"])
            axes[row, column].imshow(tinted[near])
    for row, name in enumerate(("image", "truth, enlarged", "prediction, enlarged")):
        axes[row, 0].set_title(name, loc="left", fontsize=10)
    finish(figure, axes, data.classes, data.info["colors"], path)


def around(mask: np.ndarray, share: float = 0.4) -> tuple[slice, slice]:
    """The square of `share` of a slice's side whose centre is that of the mask's foreground."""
    side = round(share * len(mask))
    corners = [int(axis.mean()) - side // 2 for axis in np.nonzero(mask)]
    row, column = (min(max(corner, 0), len(mask) - side) for corner in corners)
    return slice(row, row + side), slice(column, column + side)


def draw_volumes(path: Path, resume: Path, case: int = 0) -> None:
    """Organs of a test volume, cut through their fullest slice: truth, and after some clicks."""
    saved, precision = weights.read_checkpoint(resume), select_precision("off", CPU)
    model = build_sam_med3d(saved["args"]["sam_model"], saved["args"]["rel_pos"])
    load_model_state(model, saved["model"], resume)
    data = build_volumes("phantom3d", "test", side=model.side)
    shown = [data.objects.index((data.objects[0][0] + case, label)) for label in ORGANS]
    batch = torch.utils.data.default_collate([data[index] for index in shown])
    volume, mask = clicks3d.crops_to_device(batch, normalise, precision.device)
    generators = [clicks3d.click_generator(saved["args"]["seed"], name) for name in batch["id"]]
    with torch.inference_mode():
        answers = list(clicks3d.answers_to_clicks(model.eval(), volume, mask, generators))
    figure = Figure(figsize=(2.6 * 4, 2.75 * len(ORGANS)), layout="constrained")
    axes = figure.subplots(len(ORGANS), 4)
    for row, truth in enumerate(mask[:, 0].numpy()):
        z = int(truth.sum(axis=(0, 1)).argmax())
        image = apply_window(batch["image"][row].numpy()[..., z], (-160, 240))
        columns = {f"{batch['id'][row].split(':')[1]}, truth": truth}
        for number in (1, 3, 10):
            answer = answers[number - 1]
            score = float(clicks3d.dice(answer, mask)[row])
            name = f"{number} click{'s'[: number > 1]}, Dice {score:.2f}"
            columns[name] = (answer[row, 0] > clicks3d.THRESHOLD).numpy()
        for axis, (name, found) in zip(axes[row], columns.items(), strict=True):
            picture = outline(image[0], found[..., z].astype(np.uint8), ["#000000", "#ffb000"])
            axis.imshow(picture[::-1, ::-1].transpose(1, 0, 2))  # RAS, upright
            axis.set_title(name, loc="left", fontsize=10)
            axis.set_axis_off()
    figure.savefig(path, dpi=90)
    print(path)


def draw_pretrained(path: Path, scan_file: Path, label_file: Path) -> None:
    """The middle slice of a CT: boxes drawn from its labels, and what LiteMedSAM makes of them.

    Each box is 3 pixels wider on each side than its organ; the Dice is of this slice.
    """
    scan = open_scan(scan_file, argparse.Namespace(window=None, channel=None, series=None))
    k = scan.shape[0] // 2
    truth = scan.canonical(np.asanyarray(nib.load(label_file).dataobj))[k]
    segmenter = SliceSegmenter(
        load_pretrained("vit_t", None)[0], scan, select_precision("off", CPU)
    )
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    shown, answer = figure.subplots(1, 2)
    scores = []
    for name, label, color in PRETRAINED_ORGANS:
        organ = truth == label
        x1, y1, x2, y2 = box_of(organ)
        box = (x1 - MARGIN, y1 - MARGIN, x2 + MARGIN, y2 + MARGIN)
        found = segmenter.logits(k, box) > 0
        scores.append(f"{name} {2 * (found & organ).sum() / (found.sum() + organ.sum()):.2f}")
        size = box[2] - box[0], box[3] - box[1]
        shown.add_patch(Rectangle(box[:2], *size, fill=False, color=color, linewidth=1.8, zorder=3))
        tint = np.zeros((*found.shape, 4))
        tint[found] = (*to_rgb(color), 0.45)
        answer.imshow(tint, zorder=2)
        answer.contour(organ, levels=[0.5], colors="white", linewidths=0.9, linestyles="--")
    for axis in (shown, answer):
        axis.imshow(scan.plane(k), cmap="gray", zorder=1)
        rows, columns = (np.flatnonzero((scan.plane(k) > 0).any(axis=side)) for side in (1, 0))
        axis.set_xlim(columns[0], columns[-1])
        axis.set_ylim(rows[-1], rows[0])
        axis.set_axis_off()
    shown.set_title("CT with a box around each organ", loc="left", fontsize=11)
    answer.set_title(f"LiteMedSAM, Dice: {', '.join(scores)}", loc="left", fontsize=11)
    figure.savefig(path, dpi=90)
    print(path)


def finish(figure: Figure, axes, classes: list[str], colors: list[str], path: Path) -> None:
    """Legend, no axes, and the file."""
    for axis in axes.flat:
        axis.set_axis_off()
    patches = [Patch(color=c, label=n) for n, c in zip(classes[1:], colors[1:], strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=90)
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the README's pictures.")
    parser.add_argument("--resume", type=Path, help="checkpoint of the phantom run")
    parser.add_argument("--data_root", type=Path, help="the phantom's folder (data/phantom)")
    parser.add_argument("--resume3d", type=Path, help="checkpoint of the phantom3d run")
    parser.add_argument("--scan", type=Path, help="a CT, for pretrained.png")
    parser.add_argument("--labels", type=Path, help="its labels, with WORD's ids")
    flags = parser.parse_args()
    draw_phantom(HERE / "phantom.png")
    if flags.resume:
        draw_overlays(HERE / "overlays.png", flags.resume, flags.data_root)
    if flags.resume3d:
        draw_volumes(HERE / "volumes.png", flags.resume3d)
    if flags.scan and flags.labels:
        draw_pretrained(HERE / "pretrained.png", flags.scan, flags.labels)
