"""U-SAM's training: its slices, model, training step and validation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dataset import SliceDataset, SliceStore, build_dataset, open_store
from dataset.sides import sides
from dataset.text import printable
from dataset.transforms import AUGMENTATIONS, augment
from usam.cli.choices import CACHE_SIZE, MIXED
from usam.cli.values import jitter_pixels
from usam.evaluation.pixels import PROMPT_SOURCES, count_pixels
from usam.models.prompts import jittered, mixed_mode, prompts_from_masks
from usam.models.sam_encoder import PROMPT_WIDTH
from usam.models.size import count_parameters, multiply_accumulates
from usam.models.usam import USam, build_usam
from usam.runtime import processes
from usam.runtime.embeddings import GB, EmbeddingCache, encoder_digest
from usam.runtime.loaders import Batch, evaluation_loader, to_device
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.runtime.samplers import ClassBalancedSampling
from usam.training.cases import (
    can_validate,
    case_record,
    check_store,
    describe_validation,
    held_out_of,
)
from usam.training.checkpoint import seed_generators
from usam.training.engine import shared_generator
from usam.training.losses import class_weights, segmentation_loss
from usam.weights import sam as sam_file
from usam.weights import usam as usam_weights
from usam.weights.lora import load_lora
from usam.weights.small_checkpoint import base_of_run

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
MAX_SCORES = 6  # classes whose scores are all printed after an epoch
FEW_SCORES = 4  # how many are printed where there are more


class USamTask:
    """Training U-SAM on slices; SamMed3dTask has the same attributes and methods.

    model: the plain module, with its starting weights, on the device. train_data: indexed with
    (index, epoch). val_loader: held-out slices, None without any. step: a batch's loss. info: the
    checkpoint's "data". decay_at: see `learning_rate_factor`. balanced: class-balanced sampling.
    Raises ValueError or FileNotFoundError where flags, data and checkpoint do not fit together.
    """

    decay_at: tuple[float, ...] = ()

    def __init__(self, args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> None:
        self.args, self.precision = args, precision
        with processes.main_process_first():
            store = open_store(args.dataset, args.data_root)
        check_store(store)
        held_out = held_out_of(args, saved, store)
        self.train_data = load_split(args, "train", store, held_out)
        self.val_data = load_split(args, "val", store, held_out)
        self.classes = self.train_data.classes
        check_classes(args, saved, self.classes)
        seed_generators(args.seed)
        if saved:
            self.model = usam_weights.load_usam(saved, args.resume, args.sam_weight, merge=False)
            say(f"{args.resume}: {args.sam_model} at {args.img_size} pixels")
        else:
            self.model = build_model(args, self.train_data.info)
        self.model.to(precision.device)
        loading = {"num_workers": args.num_workers, "batch_size": args.batch_size}
        validates = can_validate(self.val_data)
        self.val_loader = evaluation_loader(self.val_data, **loading) if validates else None
        self.info = self.train_data.info | model_info(args, saved)
        self.info["preparation"] = self.model.preparation
        self.info |= case_record(args, saved, self.train_data, self.val_data)
        self.balanced = ClassBalancedSampling(args.foreground_share, self.train_data.by_class)
        weights = class_weights(args.class_weights, self.train_data.class_pixels)
        self.step = SegmentationStep(
            precision.device,
            augment=augmentation(args, self.classes, precision.device),
            prompt_mode=args.prompt_mode,
            prompt_jitter=jitter_pixels(args.prompt_jitter, args.img_size),
            class_weights=weights and torch.tensor(weights, device=precision.device),
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups with the learning rates of the flags."""
        args = self.args
        return self.model.parameter_groups(args.lr, args.lr_vit, args.lr_backbone)

    def cache_embeddings(self) -> None:
        """Keep what the frozen encoder gives on disk, for training and validation alike."""
        args, model = self.args, self.model
        facts = args.sam_model, model.stride, model.preparation, args.img_size, self.precision
        cells = args.img_size // model.stride
        cache = EmbeddingCache(
            model.embed, args.cache_embeddings, shape=(PROMPT_WIDTH, cells, cells),
            encoder=encoder_digest(model.sam.image_encoder, *facts),
            limit=GB * (CACHE_SIZE if args.cache_size is None else args.cache_size),
        )  # fmt: skip
        cache.describe(len(self.train_data) + len(self.val_data))
        model.embed = cache

    def validate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Dice of each class over all pixels of `batches`, from `val_loader`, of all processes."""
        mode = 0 if self.args.prompt_mode == MIXED else self.args.prompt_mode
        counts = count_pixels(self.model, batches, prompt_mode=mode, precision=self.precision)
        return counts.summary(self.classes) | {"prompts": PROMPT_SOURCES[mode]}

    def scores_to_print(self, summary: dict[str, Any]) -> dict[str, float | None]:
        """The scores of `validate` for an epoch's log line: each class, or a few of many."""
        dice = dict(list(summary["dice"].items())[1:])
        if len(dice) < MAX_SCORES:
            return dice | {"mean": summary["mean_dice"]}
        few = dict(list(dice.items())[:FEW_SCORES])
        return few | {f"mean of all {len(dice)} classes": summary["mean_dice"]}

    def describe(self) -> None:
        """Print the sizes of model and data, and how the best epoch is chosen."""
        args = self.args
        image = 1, 3, args.img_size, args.img_size
        say(
            f"U-SAM {args.sam_model} at {args.img_size} pixels, --adapter {args.adapter} --tuning "
            f"{args.tuning}: {count_parameters(self.model.parts())}; "
            f"{multiply_accumulates(self.model, *image) / 1e9:.2f} G multiply-accumulates a slice "
            "(the paper's GFLOPs)"
        )
        say(
            f"{args.dataset}: {len(self.train_data)} training slices, {len(self.val_data)} to "
            f"validate on; {args.input} input, --augment {args.augment}, class weights "
            f"{args.class_weights}"
        )
        describe_validation(args, self.val_data)
        if args.batch_size == 1:
            say("warning: --batch_size 1 gives poor BatchNorm statistics; use 2 or more")


@dataclass(frozen=True)
class SegmentationStep:
    """U-SAM's training step: augment, draw prompts from the masks, forward, loss.

    prompt_mode: MIXED draws a mode for each step, the same on all ranks. prompt_jitter: pixels.
    class_weights: (C,) float on the device, of the cross-entropy; None: all 1.
    """

    device: torch.device
    augment: Augment
    prompt_mode: int | str = 0
    prompt_jitter: float = 0.0
    class_weights: Tensor | None = None

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """The batch's loss; all randomness comes from `generator`."""
        image, mask = self.augment(*to_device(batch, self.device), generator)
        num_classes = getattr(model, "module", model).num_classes
        mode = self.prompt_mode
        mode = mixed_mode(shared_generator(generator)) if mode == MIXED else mode
        prompts = prompts_from_masks(mask, num_classes, mode, generator)
        if self.prompt_jitter:
            prompts = jittered(prompts, self.prompt_jitter, mask.shape[-1], generator)
        return segmentation_loss(model(image, **prompts), mask, class_weights=self.class_weights)


def augmentation(args: Namespace, classes: list[str], device: torch.device) -> Augment:
    """The augmentation of --augment, whose flips do not mix up left and right classes.

    Flipped samples are mirrored patients: paired classes take each other's ids; with a class
    whose other side is missing nothing is flipped. WORD keeps the published flips, which mix them.
    """
    found = sides(classes)
    if args.augment != "published" or not found.any:
        return AUGMENTATIONS[args.augment]
    if args.dataset == "word":
        say("warning: the published flips mirror left and right classes into each other; "
            "--augment strong has no flips")  # fmt: skip
        return augment
    if found.unpaired:
        say(f"training without flips: {printable(', '.join(found.unpaired))} has no class for the "
            "other side")  # fmt: skip
        return partial(augment, flips=False)
    say("flipped training slices swap the ids of left and right classes")
    return partial(augment, mirrored_ids=torch.tensor(found.ids, device=device))


def load_split(
    args: Namespace, split: str, store: SliceStore, held_out: dict[str, Any]
) -> SliceDataset:
    """The slices of a split of --dataset, prepared as the flags say; see `held_out_of`."""
    return build_dataset(
        args.dataset, split, data_root=args.data_root, img_size=args.img_size,
        seed=args.seed, val_fraction=args.val_fraction, empty=args.empty, input_mode=args.input,
        fold=args.fold, store=store, random_contrast=args.augment != "none", **held_out,
    )  # fmt: skip


def check_classes(args: Namespace, saved: dict[str, Any] | None, classes: list[str]) -> None:
    """Raise ValueError if the checkpoint has another number of classes than the data."""
    if saved and len(saved["data"]["classes"]) != len(classes):
        raise ValueError(
            f"{args.resume} was trained on {len(saved['data']['classes'])} classes, "
            f"--dataset {args.dataset} has {len(classes)}"
        )


def build_model(args: Namespace, data: dict[str, Any]) -> USam:
    """The model of the flags, from SAM's weights or --init and, if given, a LoRA file.

    data: the checkpoint's "data", as far as the training data know it.
    """
    classes = len(data["classes"])
    with processes.main_process_first():
        stride = usam_weights.stride_to_start_from(args.sam_model, args.sam_weight, args.init)
        model = build_usam(
            args.sam_model, classes, args.img_size, args.adapter, args.tuning, stride
        )
        start = {"init": args.init, "fold": args.fold, "data": data}
        say(usam_weights.initialize(model, args.sam_model, args.sam_weight, **start))
    if args.lora_weight:
        say(load_lora(model, args.lora_weight))
    if args.tuning != "full" and args.sam_weight == "none" and not args.init:
        say(f"warning: --tuning {args.tuning} does not train SAM's encoder, and --sam_weight none "
            "starts it from random weights")  # fmt: skip
    return model


def model_info(args: Namespace, saved: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint records about the model, besides the data."""
    whole = not args.small_checkpoints or saved or args.init
    sam_weights = None if whole else sam_file.find(args.sam_model, args.sam_weight)
    base = base_of_run(
        saved, small=args.small_checkpoints, tuning=args.tuning, sam_weights=sam_weights
    )
    facts = {name: getattr(args, name) for name in ("prompt_mode", "adapter", "tuning")}
    return facts | ({"base": base} if base else {})
