"""Slices read as a user would: one npz a slice -> CLAHE -> scipy's zoom and rotate -> float32.

benchmarks.data and benchmarks.evaluate measure the slice store against this Dataset.
"""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset


def turn_and_flip(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    quarters, axis = random.randrange(4), random.randrange(2)
    image, mask = np.rot90(image, quarters), np.rot90(mask, quarters)
    return np.flip(image, axis).copy(), np.flip(mask, axis).copy()


def rotate(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angle = random.uniform(-20, 20)
    image = ndimage.rotate(image, angle, order=0, reshape=False)
    return image, ndimage.rotate(mask, angle, order=0, reshape=False)


class PlainSlices(Dataset):
    """Items (image (3, S, S) float32 in [0, 1], mask (S, S) long) of a folder of npz files.

    Each npz holds "image" and "label" as float64 (H, W), the image in [0, 1].
    """

    def __init__(self, folder: Path, img_size: int, training: bool) -> None:
        self.files = sorted(folder.glob("*.npz"))
        self.img_size, self.training = img_size, training

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with np.load(self.files[index]) as arrays:
            image, mask = arrays["image"], arrays["label"]
        clip_limit = random.uniform(1, 4) if self.training else 2.0
        clahe = cv2.createCLAHE(clipLimit=clip_limit, tileGridSize=(8, 8))
        image = clahe.apply((image * 255).astype(np.uint8)) / 255.0
        if self.training:
            if random.random() > 0.5:
                image, mask = turn_and_flip(image, mask)
            elif random.random() > 0.5:
                image, mask = rotate(image, mask)
        if image.shape != (self.img_size, self.img_size):
            zoom = self.img_size / image.shape[0], self.img_size / image.shape[1]
            image, mask = ndimage.zoom(image, zoom, order=3), ndimage.zoom(mask, zoom, order=0)
        image = torch.from_numpy(image.astype(np.float32)).unsqueeze(0)
        return image.repeat(3, 1, 1), torch.from_numpy(mask.astype(np.int64))
