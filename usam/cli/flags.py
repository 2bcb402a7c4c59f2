"""All flags of u-sam.py, one row each: parser, defaults and docs/flags.md are made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from usam.cli.choices import (
    ADAPTERS,
    AUTO_RECIPE,
    CACHE,
    DATASETS,
    INPUTS,
    MIXED,
    MODELS,
    NAMES,
    PREPARATIONS,
    PROMPT_MODES,
    RECIPES,
    REL_POS,
    SAM_MED3D_MODELS,
    SAM_MODELS,
    TTA,
    TUNINGS,
    VOLUMES,
)
from usam.cli.values import (
    address,
    class_weights,
    duration,
    jitter,
    millimetres,
    number,
    orientation,
    path,
    prompt_mode,
    share,
    whole,
    words,
)

USAM, MED3D = MODELS
SAME = object()  # both models have one default
MAX_SIZE = 4096  # pixels; SAM's own input has 1024
MAX_WORKERS, MAX_PROCESSES = 512, 4096
LOCAL = ("127.0.0.1", 1527)  # --serve


@dataclass(frozen=True)
class Flag:
    """One flag.

    default, med3d: its value where it is left out, for u-sam and, if that differs, sam-med3d.
    shown: the default in words, where its value does not say enough.
    model: the only model that has it. runs: "eval", "predict": the runs that it belongs to.
    resume: what becomes of it when a run is resumed from a checkpoint:
    "" nothing, the flag says what this run does; "kept": the checkpoint's value unless another is
    given; "decisive": as kept, but another value changes the result and needs --override;
    "model": also in evaluation and prediction, as it describes the model.
    type: None for a switch. nargs, const, metavar: as in argparse. repeated: may be given several
    times.
    """

    name: str
    group: str
    help: str
    type: Callable[[str], Any] | None = words
    choices: tuple[Any, ...] = ()
    default: Any = None
    med3d: Any = SAME
    shown: str = ""
    model: str = ""
    runs: tuple[str, ...] = ()
    resume: str = ""
    nargs: str | int | None = None
    const: Any = None
    metavar: str | tuple[str, ...] | None = None
    repeated: bool = False

    def default_of(self, model: str) -> Any:
        """The value for `model` where the flag is left out."""
        return self.med3d if model == MED3D and self.med3d is not SAME else self.default

    def fits(self, model: str) -> bool:
        """Whether `model` has this flag."""
        return self.model in ("", model)


_PUBLISHED = RECIPES["published"]

# fmt: off
FLAGS = (
    # ------------------------------------------------------------------------------------ data
    Flag("dataset", "data", "data set to train and evaluate on",
         choices=(*DATASETS, *VOLUMES), default="rectum", med3d="phantom3d", resume="decisive"),
    Flag("data_root", "data", "folder of the data set; --dataset volumes takes several",
         path, nargs="+", metavar="PATH",
         shown="data/CARE, data/WORD, data/phantom or data/phantom3d"),
    Flag("classes", "data", "train and evaluate on these classes only",
         nargs="+", metavar="NAME", model=MED3D, shown="all classes"),
    Flag("no_flips", "data", "train without mirrored crops",
         None, default=False, model=MED3D, resume="decisive"),
    Flag("val_fraction", "data",
         "fraction of the training cases held out for validation; 0 validates on the test cases, "
         "as published", number(0, below=1), default=0.1, metavar="F", resume="decisive"),
    Flag("fold", "data",
         "number of the cross-validation fold to validate on, from 0; the store must have been "
         "prepared with --folds", whole(0, 10**6), model=USAM, metavar="K", resume="decisive"),
    Flag("empty", "data",
         "training slices without foreground: keep all, drop all, or keep N%",
         share, model=USAM, metavar="keep|drop|N%", shown="keep; word: drop", resume="decisive"),
    Flag("num_workers", "data",
         "DataLoader workers per process, for training and for validation; threads in prediction",
         whole(0, MAX_WORKERS), default=2, metavar="N"),
    # ----------------------------------------------------------------------------------- model
    Flag("model", "model", "model: u-sam segments slices, sam-med3d clicked objects in volumes",
         choices=MODELS, shown="that of --resume, else u-sam"),
    Flag("sam_model", "model", "size of SAM's image encoder",
         choices=tuple(dict.fromkeys((*SAM_MODELS, *SAM_MED3D_MODELS))),
         default="vit_b", med3d="vit_b_ori", resume="model"),
    Flag("sam_weight", "model",
         "file of SAM's or SAM-Med3D's weights to start from; none: random weights",
         metavar="PATH|none", shown="found or downloaded in weight/"),
    Flag("sam_preprocess", "model",
         "without --resume: scale of the image that SAM's weights were trained with: sam: its mean "
         "and deviation, minmax: 0 to 1, as MedSAM", choices=PREPARATIONS,
         shown="the file's own", model=USAM, runs=("predict",)),
    Flag("adapter", "model",
         "u: SAM within the published U-shaped adapter; none: SAM's own patch embedding and "
         "decoder", choices=ADAPTERS, default="u", model=USAM, resume="model"),
    Flag("tuning", "model",
         "how SAM's encoder is trained: full: all weights, lora: LoRA on queries and values, "
         "decoder: frozen; everything else is always trained",
         choices=TUNINGS, default="full", model=USAM, resume="model"),
    Flag("lora_weight", "model", "file of LoRA weights in SAMed's format to start from "
         "(.pth, .safetensors)", path, model=USAM, metavar="FILE"),
    Flag("init", "model",
         "checkpoint with other classes to start from; weights of equal name and shape are taken",
         path, model=USAM, metavar="PATH"),
    Flag("rel_pos", "model",
         "relative positions of the encoder: as the published weights need them, or corrected",
         choices=REL_POS, default="published", model=MED3D, resume="model"),
    Flag("img_size", "model", "side of the input image in pixels, a multiple of 16",
         whole(16, MAX_SIZE), default=224, model=USAM, metavar="PIXELS", resume="model"),
    Flag("input", "model",
         "2d: one slice; 2.5d: the slice between its two neighbours, as three channels",
         choices=INPUTS, default="2d", model=USAM, resume="model"),
    Flag("prompt_mode", "model",
         "prompts: 0 = none, 1 = boxes, 2 = points (3 per class), 3 = boxes and points; mixed: "
         "trained on all four in turn, evaluated without prompts",
         prompt_mode, choices=(*PROMPT_MODES, MIXED), default=0, model=USAM, resume="model"),
    Flag("prompt_jitter", "model",
         "shift of training prompts at random, in pixels (N) or percent of the image's side (N%)",
         jitter, default="0", model=USAM, metavar="N|N%", resume="decisive"),
    # -------------------------------------------------------------------------------- training
    Flag("epochs", "training", "number of passes over the training data",
         whole(1), default=100, med3d=200, metavar="N", resume="kept"),
    Flag("batch_size", "training", "batch size per process",
         whole(1), default=24, med3d=12, metavar="N", resume="kept"),
    Flag("accumulation_steps", "training", "batches accumulated per optimizer step",
         whole(1), default=1, med3d=20, metavar="N", resume="decisive"),
    Flag("lr", "training", "learning rate of the mask decoder and the prompt encoder",
         number(0), default=1e-3, med3d=8e-5, metavar="RATE", resume="decisive"),
    Flag("lr_vit", "training", "learning rate of SAM's image encoder",
         number(0), default=1e-4, med3d=8e-4, metavar="RATE", resume="decisive"),
    Flag("lr_backbone", "training", "learning rate of the convolutional path",
         number(0), default=1e-4, model=USAM, metavar="RATE", resume="decisive"),
    Flag("weight_decay", "training", "weight decay of AdamW",
         number(0), default=1e-4, med3d=0.1, metavar="DECAY", resume="decisive"),
    Flag("rounds", "training", "clicks simulated in each training step",
         whole(1, 1000), default=11, model=MED3D, metavar="N", resume="decisive"),
    Flag("warmup", "training", "increase the learning rates linearly over the first half epoch",
         None, default=False, resume="decisive"),
    Flag("clip_max_norm", "training", "largest gradient norm; 0: no clipping",
         number(0), default=0.0, metavar="NORM", resume="decisive"),
    Flag("seed", "training", "random seed",
         whole(0, 2**63 - 1), default=202307, metavar="N", resume="decisive"),
    Flag("cache_embeddings", "training",
         "with --tuning decoder, and --adapter none or --sam_model vit_t: compute the embeddings "
         "of SAM's frozen encoder once and keep them in this folder; without augmentation",
         path, nargs="?", const=CACHE, metavar="FOLDER", model=USAM, shown="off; cache"),
    Flag("cache_size", "training", "most that the folder of --cache_embeddings may take, in GB",
         number(0), metavar="GB", model=USAM, shown="20", runs=("cache_embeddings",)),
    # ---------------------------------------------------------------------------------- recipe
    Flag("recipe", "recipe",
         "preset for the flags of this group: published, strong (what scored best in tests), or "
         "auto: these, the model and the sizes are planned from the data and --budget",
         choices=(*RECIPES, AUTO_RECIPE), default="published", shown="published; store: auto",
         model=USAM, resume="kept"),
    Flag("budget", "recipe", "with --recipe auto: time to train in, such as 90s, 30m or 2h",
         duration, model=USAM, metavar="TIME", shown="30m", resume="kept"),
    Flag("augment", "recipe",
         "augmentation: published: quarter turns and flips; strong: small rotation, scale, shift, "
         "gamma and noise; none: slices as in evaluation",
         choices=("published", "strong", "none"), default=_PUBLISHED["augment"],
         model=USAM, resume="decisive"),
    Flag("class_weights", "recipe",
         "weights of the classes in the cross-entropy, background first",
         class_weights, default=_PUBLISHED["class_weights"], model=USAM,
         metavar="none|balanced|W,W,...", resume="decisive"),
    Flag("foreground_share", "recipe",
         "percentage of an epoch's slices drawn by class, each class equally likely",
         share, default=_PUBLISHED["foreground_share"], model=USAM, metavar="N%",
         resume="decisive"),
    Flag("ema", "recipe",
         "decay of the weight average that is validated and saved as best.pth, for example 0.99; "
         "0: no average", number(0, below=1), default=_PUBLISHED["ema"], metavar="DECAY",
         resume="decisive"),
    # ------------------------------------------------------------------------------------- run
    Flag("eval", "run", "evaluate the checkpoint of --resume on the test cases", None),
    Flag("resume", "run",
         "checkpoint to continue training from, to evaluate or to predict with; several are "
         "averaged by --eval and --predict; auto: newest checkpoint in --output_dir, if any",
         path, nargs="+", metavar="PATH|auto"),
    Flag("override", "run",
         "continue although flags or data differ from the checkpoint; each difference is printed",
         None),
    Flag("overwrite", "run",
         "replace files that this program did not write, or that were edited since", None),
    Flag("start_epoch", "run", "number of the first epoch, from 0",
         whole(0), metavar="N", shown="the checkpoint's"),
    Flag("save_every", "run", "also save within epochs, after this number of optimizer steps",
         whole(1), metavar="STEPS", shown="off"),
    Flag("keep", "run", "number of earlier versions of best.pth and last.pth to keep",
         whole(0, 1000), default=1, metavar="N"),
    Flag("small_checkpoints", "run",
         "with --tuning lora or decoder: save without SAM's frozen weights; --resume then needs "
         "SAM's file", None, default=False, model=USAM, resume="kept"),
    Flag("export_lora", "run",
         "write the LoRA weights of --resume in SAMed's format to this file (.pth, .safetensors)",
         path, model=USAM, metavar="FILE"),
    Flag("export_weights", "run",
         "write the weights of --resume to this file, in the format of SAM-Med3D's published "
         "checkpoints", path, model=MED3D, metavar="FILE"),
    Flag("output_dir", "run", "output folder",
         path, metavar="PATH", shown="chkpt; phantom: chkpt/phantom"),
    Flag("tensorboard", "run", "also write the curves for TensorBoard", None),
    Flag("device", "run", "device to compute on; auto: CUDA, else Apple's MPS, else the CPU",
         default="auto", metavar="auto|cuda|mps|cpu"),
    Flag("amp", "run",
         "mixed precision: bfloat16, float16 or off; auto: the fastest that trains well on the "
         "device", choices=("auto", "bf16", "fp16", "off"), default="auto"),
    Flag("compile", "run", "compile the training step; auto: u-sam on CUDA",
         choices=("auto", "on", "off"), default="auto"),
    Flag("checkpoint_activations", "run",
         "recompute activations in the backward pass: less memory, more time", None),
    Flag("world_size", "run", "number of processes that srun starts; torchrun sets it itself",
         whole(1, MAX_PROCESSES), metavar="N", shown="1"),
    Flag("dist_url", "run",
         "URL for setting up distributed training under srun: tcp://HOST:PORT or file:///PATH",
         default="env://", metavar="URL"),
    # ------------------------------------------------------------------------------ evaluation
    Flag("spacing", "evaluation",
         "mm between slices, rows and columns, where the data do not say",
         millimetres, nargs=3, metavar=("Z", "Y", "X"), shown="distances in pixels", model=USAM,
         runs=("eval",)),
    Flag("prompt_sweep", "evaluation",
         "also print the scores of every prompt mode, with exact and with shifted prompts",
         None, model=USAM, runs=("eval",)),
    Flag("tta", "evaluation",
         "average over flipped views of each slice (flip: 4 views), or flipped and rotated ones "
         "(flip+rot: 8)", choices=TTA, shown="off", model=USAM, runs=("eval", "predict")),
    Flag("clicks", "evaluation",
         "where the next click is simulated: anywhere in the error, or in its largest region; "
         "challenge: five clicks and the scores of the CVPR 2025 challenge",
         choices=("random", "largest", "challenge"), default="random", model=MED3D, resume="kept"),
    Flag("merge", "evaluation",
         "write one report of the cases in several output folders of --eval, such as all folds",
         path, nargs="+", metavar="FOLDER", model=USAM),
    # ------------------------------------------------------------------------------ prediction
    Flag("predict", "prediction",
         "segment these scans: NIfTI, NRRD or npz files, folders of DICOM series, folders of scans",
         path, nargs="+", metavar="PATH"),
    Flag("window", "prediction",
         "intensity window: LOW HIGH in HU, percentile, or the name of a preset",
         nargs="+", metavar="W", model=USAM,
         shown="the checkpoint's; without --resume abdomen for CT, else percentile",
         runs=("predict", "serve", "annotate")),
    Flag("channel", "prediction", "number of the volume to use in files with several, from 0",
         whole(0), metavar="N", runs=("predict", "annotate")),
    Flag("series", "prediction",
         "number of the DICOM series to use in folders with several, from 1; left out, they are "
         "listed", whole(1), metavar="N", runs=("predict",)),
    Flag("box", "prediction",
         "box prompt in voxels: x1 y1 x2 y2 on --slice; sam-med3d, or without --resume: "
         "x1 y1 z1 x2 y2 z2; may be repeated",
         number(), nargs="+", metavar="V", repeated=True, runs=("predict",)),
    Flag("slice", "prediction", "number of the slice of a --box, from 0, once for each box",
         whole(0), metavar="K", repeated=True, model=USAM, runs=("predict",)),
    Flag("point", "prediction",
         "point prompt in voxels from 0: x y z [label], label 1 object (default) or 0 background; "
         "may be repeated", number(), nargs="+", metavar="V", repeated=True, runs=("predict",)),
    Flag("mm", "prediction",
         "--point, and sam-med3d's --box, are in scanner coordinates (RAS, mm)",
         None, runs=("predict",)),
    Flag("lps", "prediction",
         "millimetres of --point, --box and --prompts are LPS, as in DICOM, instead of RAS",
         None, runs=("predict",)),
    Flag("prompts", "prediction",
         "JSON file with the boxes and points of one or more scans, or a .mrk.json file of one "
         "from 3D Slicer", path, metavar="FILE", runs=("predict",)),
    Flag("init_mask", "prediction", "label map of the scan to refine",
         path, metavar="PATH", model=MED3D, runs=("predict",)),
    Flag("probabilities", "prediction", "also write the class probabilities as a 4D NIfTI file",
         None, model=USAM, runs=("predict",)),
    Flag("overlay", "prediction", "also write a PNG of the segmentation on evenly spaced slices",
         None, runs=("predict",)),
    Flag("names", "prediction",
         "name of a label map: seg: SCAN_seg.nii.gz, nnunet: SCAN.nii.gz",
         choices=NAMES, shown="seg", runs=("predict",)),
    Flag("largest_component", "prediction",
         "keep only the largest connected component of each class",
         None, model=USAM, runs=("predict",)),
    # ----------------------------------------------------------------------------- interactive
    Flag("serve", "interactive",
         "answer clicks from 3D Slicer and napari (nnInteractive's protocol) at this port, or "
         "HOST:PORT for other machines", address, nargs="?", const=LOCAL, metavar="PORT",
         shown="127.0.0.1:1527"),
    Flag("annotate", "interactive",
         "display these scans in the browser to click and correct them; saved in --output_dir",
         path, nargs="+", metavar="PATH"),
    Flag("serve_key", "interactive",
         "key that clients must give; needed where other machines can connect",
         metavar="KEY", shown="NN_INTERACTIVE_API_KEY",
         runs=("serve", "annotate")),
    Flag("max_sessions", "interactive", "number of clients at a time; each holds an image",
         whole(1, 64), default=1, metavar="N"),
    Flag("orientation", "interactive",
         "where the columns, rows and slices of a client's images lead; the protocol does not say",
         orientation, default="LPS", metavar="LPS|RAS|..."),
)
# fmt: on

# Flags of earlier versions, with the value that switched them off.
REMOVED = {"focal_gamma": 0, "patience": 0}
DEFAULTS = {
    model: {flag.name: flag.default_of(model) for flag in FLAGS if flag.resume and flag.fits(model)}
    for model in MODELS
}
# Of a resumed training: another value changes the result.
DECISIVE = frozenset(flag.name for flag in FLAGS if flag.resume in ("decisive", "model"))
