"""The flags of u-sam.py by group: name, kind and one line of help each.

usam.flags puts them together, checks them against each other and has what they default to.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from usam.cli.choices import (
    ADAPTERS,
    INPUTS,
    MIXED,
    MODELS,
    PROMPT_MODES,
    REL_POS,
    SAM_MED3D_MODELS,
    SAM_MODELS,
    TUNINGS,
)
from usam.cli.flag_values import (
    class_weights,
    count,
    decay,
    jitter,
    non_negative,
    positive,
    prompt_mode,
    share,
)
from usam.cli.recipes import RECIPES


def add_data_flags(parser: argparse.ArgumentParser, datasets: Iterable[str]) -> None:
    """What is learnt from."""
    flag = parser.add_argument_group("data").add_argument
    flag("--dataset", choices=sorted(datasets), help="what to work on (rectum; phantom3d)")
    flag("--data_root", nargs="+", type=Path, metavar="PATH",
        help="its folder (data/CARE, data/WORD, data/phantom); volumes: or several")  # fmt: skip
    flag("--classes", nargs="+", metavar="NAME", help="sam-med3d: only these classes (all)")
    flag("--no_flips", action="store_true", default=None, help="sam-med3d: train without flips")
    flag(
        "--val_fraction",
        type=float,
        metavar="F",
        help="share of the training cases to validate on; 0: on the test cases (0.1)",
    )
    flag("--fold", type=count, metavar="K",
        help="validate on fold K, from 0, of a store prepared with --folds")  # fmt: skip
    flag("--empty", type=share, metavar="keep|drop|N%",
        help="training slices without foreground (keep; word: drop)")  # fmt: skip
    flag("--num_workers", type=count, default=2, help="loader processes for each process (2)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What is built, and the weights it starts from."""
    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=MODELS, help="slices or volumes (u-sam, or --resume's)")
    sizes = list(dict.fromkeys([*SAM_MODELS, *SAM_MED3D_MODELS]))
    flag("--sam_model", choices=sizes, help="the encoder's size (vit_b; vit_b_ori)")
    flag("--sam_weight", metavar="PATH|none", help="weights to start from (in weight/)")
    flag("--adapter", choices=ADAPTERS,
        help="SAM with the U-shaped adapter, or none: its own patches and decoder (u)")  # fmt: skip
    flag("--tuning", choices=TUNINGS,
        help="SAM's encoder: all of it, LoRA on its queries and values, or nothing; "
        "decoder, prompts and adapter always are (full)")  # fmt: skip
    flag("--lora_weight", type=Path, metavar="FILE",
        help="start LoRA from a file named as SAMed's (.pth, .safetensors)")  # fmt: skip
    flag("--init", type=Path, metavar="PATH",
        help="start from a checkpoint of other classes; what fits is taken")  # fmt: skip
    flag("--rel_pos", choices=REL_POS,
        help="sam-med3d: positions as the published weights need them (published)")  # fmt: skip
    flag("--img_size", type=positive, help="side of the input, pixels, a multiple of 16 (224)")
    flag("--input", choices=INPUTS,
        help="a slice alone, or between its neighbours as three channels (2d)")  # fmt: skip
    flag("--prompt_mode", type=prompt_mode, choices=(*PROMPT_MODES, MIXED),
        help="0 no prompts, 1 boxes, 2 points (3 a class), 3 both; "
        "mixed: trained on all four in turn, evaluated with none (0)")  # fmt: skip
    flag("--prompt_jitter", type=jitter, metavar="N|N%",
        help="train with prompts up to N pixels, or %% of the image, off (0)")  # fmt: skip


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """How long, how fast, and what from at random."""
    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=positive, help="passes over the training data (100; 200)")
    flag("--batch_size", type=positive, help="samples a batch and process (24; 12)")
    flag("--accumulation_steps", type=positive, help="batches a step (1; 20)")
    flag("--lr", type=non_negative, help="rate of decoder and prompts (1e-3; 8e-5)")
    flag("--lr_vit", type=non_negative, help="rate of SAM's encoder (1e-4; 8e-4)")
    flag("--lr_backbone", type=non_negative, help="rate of the down path (1e-4)")
    flag("--weight_decay", type=non_negative, help="AdamW's (1e-4; 0.1)")
    flag("--rounds", type=positive, help="sam-med3d: clicks simulated in a training step (11)")
    flag("--warmup", action="store_true", default=None,
        help="ramp the rates up over half an epoch")  # fmt: skip
    flag("--clip_max_norm", type=non_negative, help="gradient norm limit (0: off)")
    flag("--seed", type=count, help="of everything drawn at random (202307)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """What a run does, where, and what it leaves."""
    flag = parser.add_argument_group("run").add_argument
    flag("--small_checkpoints", action="store_true", default=None,
        help="lora, decoder: save without SAM's frozen part; "
        "--resume then needs SAM's file")  # fmt: skip
    flag("--export_lora", type=Path, metavar="FILE",
        help="write --resume's LoRA under SAMed's names (.pth, .safetensors)")  # fmt: skip
    flag("--clicks", choices=("random", "largest"),
        help="sam-med3d: --eval clicks any error or the largest (random)")  # fmt: skip
    flag("--eval", action="store_true", help="evaluate --resume on the test cases")
    flag("--resume", nargs="+", type=Path, metavar="PATH|auto",
        help="checkpoint to go on from or evaluate, or several to average; "
        "auto: the newest one, if any")  # fmt: skip
    flag("--tensorboard", action="store_true", help="write curves for TensorBoard, too")
    flag("--override", action="store_true",
        help="go on from --resume although flags or data changed")  # fmt: skip
    flag("--save_every", type=positive, metavar="STEPS", help="save within epochs, too")
    flag("--keep", type=count, default=1, metavar="N",
        help="predecessors of best.pth and last.pth that stay (1)")  # fmt: skip
    flag("--start_epoch", type=count, help="first epoch, instead of the checkpoint's")
    flag("--output_dir", type=Path, default=Path("chkpt"), help="for all that is written (chkpt)")
    flag("--device", default="auto", metavar="auto|cuda|mps|cpu", help="where to compute (auto)")
    flag("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision (auto: what the device is fast at)")  # fmt: skip
    flag("--compile", choices=("auto", "on", "off"), default="auto",
        help="torch.compile the training step (auto: u-sam on CUDA)")  # fmt: skip
    flag("--checkpoint_activations", action="store_true",
        help="train large images in less memory and more time")  # fmt: skip
    flag("--world_size", type=positive, default=1, help="processes, where srun starts them (1)")
    flag("--dist_url", default="env://", help="tcp://host:port where those meet")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `--recipe` sets together."""
    flag = parser.add_argument_group("recipe").add_argument
    flag("--recipe", choices=list(RECIPES),
        help="the flags below as published, or as they scored best (published)")  # fmt: skip
    flag("--augment", choices=("published", "strong"),
        help="turns, flips; or small turns, scale, shift, gamma, noise (published)")  # fmt: skip
    flag("--class_weights", type=class_weights, metavar="none|balanced|W,W,...",
        help="of the cross-entropy, background first (none)")  # fmt: skip
    flag("--focal_gamma", type=non_negative, metavar="G",
        help="focal loss instead of cross-entropy (0: cross-entropy)")  # fmt: skip
    flag("--foreground_share", type=share, metavar="N%",
        help="slices of an epoch drawn for a class they show, any class as likely (0)")  # fmt: skip
    flag("--ema", type=decay, metavar="DECAY",
        help="validate and predict with averaged weights, e.g. 0.99 (0: off)")  # fmt: skip
    flag("--patience", type=count, metavar="EPOCHS",
        help="stop after so many epochs without a better validation score (0: off)")  # fmt: skip


def add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of --predict."""
    flag = parser.add_argument_group("prediction").add_argument
    flag("--predict", nargs="+", type=Path, metavar="PATH",
        help="segment scans: NIfTI, NRRD, npz, DICOM series folders, folders of scans")  # fmt: skip
    flag("--window", nargs="+", metavar="W",
        help="LOW HIGH (HU), percentile or a preset, instead of the checkpoint's")  # fmt: skip
    flag("--channel", type=count, help="which of several volumes in a file, from 0")
    flag("--box", nargs="+", type=float, action="append", metavar="V",
        help="x1 y1 x2 y2 on --slice, repeatable; sam-med3d: x1 y1 z1 x2 y2 z2")  # fmt: skip
    flag("--slice", type=count, action="append", metavar="K",
        help="the slice of a --box, from 0, one for each box")  # fmt: skip
    flag("--point", nargs="+", type=float, action="append", metavar="V",
        help="x y z [label]: voxel from 0, label 1 object or 0 not; repeatable")  # fmt: skip
    flag("--mm", action="store_true", help="--point is in scanner millimetres (RAS)")
    flag("--prompts", type=Path, metavar="FILE", help="boxes and points as JSON, also for many")
    flag("--init_mask", type=Path, metavar="PATH",
        help="sam-med3d: a label map of the scan to refine")  # fmt: skip
    flag("--probabilities", action="store_true", help="also a 4D NIfTI of class probabilities")
    flag("--overlay", action="store_true", help="also a PNG of slices spread over the foreground")
    flag("--largest_component", action="store_true", help="keep the largest piece of each class")
