"""Allowed values of flags, each stated once; no torch, so that the command line parses quickly."""

from __future__ import annotations

from pathlib import Path

MODELS = ("u-sam", "sam-med3d")
DATASETS = ("rectum", "word", "phantom", "store")  # --dataset of u-sam: dataset.DATASETS
VOLUMES = ("volumes", "phantom3d")  # and of sam-med3d: dataset.VOLUMES
SAM_MODELS = ("vit_b", "vit_l", "vit_h", "vit_t", "vit_tiny")  # --sam_model of u-sam
SAM_MED3D_MODELS = ("vit_b_ori", "vit_b", "vit_l", "vit_h", "vit_tiny")  # and of sam-med3d
ADAPTERS = ("u", "none")
TUNINGS = ("full", "lora", "decoder")
PREPARATIONS = ("sam", "minmax")  # --sam_preprocess
INPUTS = ("2d", "2.5d")
REL_POS = ("published", "corrected")
PROMPT_MODES = {0: "none", 1: "boxes", 2: "points", 3: "points and boxes"}
MIXED = "mixed"  # --prompt_mode: in training one of the modes, another in each step
CLICKS = "clicks"  # the prompt mode in checkpoints of sam-med3d
NAMES = ("seg", "nnunet")  # --names of label maps that --predict writes
TTA = ("flip", "flip+rot")
AUTO = Path("auto")  # --resume: the newest checkpoint
OUTPUT_DIR = Path("chkpt")
CACHE, CACHE_SIZE = Path("cache"), 20.0  # --cache_embeddings, --cache_size (GB)

# The flags that --recipe sets; a flag that is given wins. `published` is the published training,
# `strong` what scored best in docs/evidence.md.
RECIPES = {
    "published": {
        "augment": "published",
        "class_weights": "none",
        "foreground_share": 0.0,
        "ema": 0.0,
    },
    "strong": {
        "augment": "strong",
        "class_weights": "balanced",
        "foreground_share": 0.33,
        "ema": 0.98,
    },
}

AUTO_RECIPE = "auto"  # and this one plans them, with PLANNED, from the data and --budget
PLANNED = (
    *RECIPES["strong"], "sam_model", "sam_weight", "tuning", "img_size", "batch_size", "epochs",
    "lr", "lr_vit", "lr_backbone", "warmup",
)  # fmt: skip

# What flags that are left out mean for a data set in a fresh training without --recipe: from random
# weights, the phantom is learnt best with a low rate for the encoder, and in a few minutes.
DATASET_DEFAULTS = {
    "store": {"recipe": AUTO_RECIPE},
    "phantom": {
        "sam_weight": "none",
        "img_size": 112,
        "epochs": 2,
        "batch_size": 8,
        "lr": 8e-4,
        "lr_vit": 4e-5,
        "lr_backbone": 1e-3,
        "warmup": True,
        "augment": "strong",
        "class_weights": "1,2,4",
        "val_fraction": 0.2,
        "output_dir": Path("chkpt/phantom"),
    },
}
