"""The epoch loop that U-SAM and SAM-Med3D share: train, validate, log, save, stop and go on.

u-sam.py calls `train` for both; beside it and sam_med3d.py this file alone sees the flags.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader

from usam.cli import flags
from usam.evaluation.metrics import rank_score
from usam.runtime import processes
from usam.runtime.loaders import loader_for
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.runtime.samplers import TrainingBatches
from usam.runtime.signals import STOPPED, StopRequest, Watched
from usam.training import checkpoint, engine, manifest
from usam.training.compilation import compile_training, should_compile
from usam.training.curves import RunCurves, summary_writer
from usam.training.ema import WeightAverage
from usam.training.epoch_sums import EpochSums
from usam.training.job import Job
from usam.training.quarantine import UNREADABLE, Quarantine, collate, most_unreadable
from usam.training.recomputation import recompute_activations
from usam.training.resume import best_so_far
from usam.training.run_folder import RunFolder, run_state
from usam.training.schedule import warmup_length

Saved = dict[str, Any] | None


def train(args: Namespace, precision: Precision, job: Job, saved: Saved, stop: StopRequest) -> None:
    """Train until `--epochs` are done; evaluate, log and save after each.

    Where `stop` was asked for, all is saved, within an epoch or before its validation, and the
    program ends with code STOPPED.
    """
    run = Run(args, precision, job, saved, stop)
    stop.watch()
    if run.is_over:
        done = f"{run.progress.epoch} epochs are done, --epochs is {args.epochs}"
        say(f"nothing left to train: {done}; a larger --epochs goes on")
    while not run.is_over:
        if stop.asked(at_once=True):
            run.leave()
        run.train_epoch()
        run.close_epoch()
    run.folder.finish()
    say(f"best.pth, last.pth and log.jsonl in {args.output_dir}")


class Run:
    """A training run, fresh or from `saved`: what it is made of and where it stands.

    progress: the position. best: epoch and score. begun: the sums of an epoch it stands within.
    line: the figures of an epoch that is trained, but not yet validated.
    """

    def __init__(
        self, args: Namespace, precision: Precision, job: Job, saved: Saved, stop: StopRequest
    ) -> None:
        self.args, self.job, self.stop = args, job, stop
        if args.tensorboard:
            summary_writer()  # or an error, before an earlier run's files are moved
        self.loader = training_loader(args, precision, job)
        facts = manifest.facts_of(
            vars(args), job.info, world_size=processes.world_size(), precision=str(precision)
        )
        told = json.dumps([facts["arguments"], facts["data"], str(precision)])
        processes.check_same(told, "the flags, the precision or the listings of the data")
        if saved:
            with blamed_on(args.resume):
                check_saved(args, saved, facts)
        optimizer = engine.build_optimizer(job.groups, args.weight_decay)
        scaler = precision.scaler()
        with blamed_on(args.resume):
            self._restore(saved, optimizer, scaler)
            self.average = WeightAverage(job.model, args.ema, (saved or {}).get("average"))
        first = self.line["epoch"] if self.line else self.progress.epoch
        self.folder = RunFolder(args.output_dir, args.resume, first, keep=args.keep)
        self.folder.describe(
            facts, {"resumed": args.resume and str(args.resume), **vars(self.progress)}
        )
        self.curves = RunCurves(args.output_dir, tensorboard=args.tensorboard, first_epoch=first)
        self.best = best_so_far(self.best, args.resume, args.output_dir)
        self._state = partial(
            run_state, flags=vars(args), data=job.info, model=job.model, progress=self.progress,
            best=self.best, optimizer=optimizer, scaler=scaler, average=self.average, facts=facts,
        )  # fmt: skip
        self._one_epoch = partial(
            engine.train_one_epoch, processes.wrap(job.model, precision.device), self.loader,
            optimizer, step=job.step, recipe=recipe_of(args, job), precision=precision,
            scaler=scaler, progress=self.progress, average=self.average,
        )  # fmt: skip
        self._steps, self._started = 0, time.perf_counter()

    def _restore(
        self, saved: Saved, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Start at the beginning or where `saved` is; optimizer, scaler and generators as there."""
        self.progress, self.best = engine.Progress(), {"epoch": None, "mean_dice": None}
        self.begun = self.line = None
        batches = self.loader.batch_sampler
        if saved:
            restore(saved, optimizer, scaler)
            self.progress, self.best = engine.Progress(**saved["progress"]), dict(saved["best"])
            self.begun, self.line = saved.get("in_epoch"), saved.get("unvalidated")
            then = saved.get("manifest", {}).get("samples_per_step", batches.samples_per_step)
            step = self.progress.step * then // batches.samples_per_step  # with --override
            self.progress.step = min(step, len(batches))
        if self.args.start_epoch is not None:
            epoch = self.args.start_epoch
            samples = epoch * len(batches) * batches.samples_per_step
            self.progress = engine.Progress(epoch=epoch, samples=samples)
            self.begun = self.line = None

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done."""
        return not self.line and self.progress.epoch >= self.args.epochs

    def train_epoch(self) -> None:
        """Train the epoch, or the rest of it, up to its validation; leaves if asked to."""
        self._started = time.perf_counter()
        if self.line:
            return
        epoch, batches = self.progress.epoch, self.loader.batch_sampler
        batches.epoch, batches.first_step = epoch, self.progress.step
        figures = self._one_epoch(begun=self.begun, after_step=self._after_step)
        if figures is None:
            self.leave()
        self.begun = None
        self.line = {"epoch": epoch} | figures | {"samples": self.progress.samples}
        self.line |= counts(batches, figures["quarantined"])

    def _after_step(self, sums: EpochSums) -> bool:
        """Save where --save_every says so; whether to stop here."""
        self._steps += 1
        if self.stop.asked():
            self.begun = sums.state()
            return True
        if self.args.save_every and self._steps % self.args.save_every == 0:
            state = partial(self._state, begun=sums.state())
            self.folder.save(state, as_best=False, may_skip=False)
        return False

    def close_epoch(self) -> None:
        """Validate, log and save the epoch that `line` is of; leaves if asked to before it ends."""
        job, line, best = self.job, dict(self.line), self.best
        processes.broadcast_buffers(job.model)
        processes.check_same_weights(job.model, line["epoch"])
        if self.stop.asked(at_once=True):
            self.leave()
        score = None
        if job.validate:
            with self.average.in_use():
                line["val"] = job.validate(partial(Watched, stop=self.stop))
            score = line["val"]["mean_dice"]
        if self.stop.agreed:  # perhaps within the validation, which then is worth nothing
            self.leave()
        self.line = None
        is_best = best["epoch"] is None or rank_score(score) > rank_score(best["mean_dice"])
        if is_best or not job.validate:
            best.update(epoch=line["epoch"], mean_dice=score)
        self.folder.log(line)
        self.curves.add(line, last=self.is_over)
        figures = job.shown(line["val"]) if job.validate else {}
        seconds = time.perf_counter() - self._started
        say(one_line(line, figures, seconds, is_best=is_best))
        self.folder.save(
            self._state,
            as_best=is_best or not job.validate,
            may_skip=not (is_best and job.validate) and not self.is_over,
        )

    def leave(self) -> NoReturn:
        """Save where the run stands, wait for the disk and for all processes, end with STOPPED."""
        state = partial(self._state, begun=self.begun, line=self.line)
        self.folder.save(state, as_best=False, may_skip=False)
        self.folder.finish()
        self.stop.wait_for_all()
        epoch, step = self.progress.epoch, self.progress.step
        where = f"within epoch {epoch}, after {step} batches" if step else f"before epoch {epoch}"
        if self.line:
            where = f"before the validation of epoch {epoch - 1}"
        say(f"stopped as asked {where}: last.pth in {self.args.output_dir} goes on there")
        sys.exit(STOPPED)


def training_loader(args: Namespace, precision: Precision, job: Job) -> DataLoader:
    """What hands out the training batches, after the model was made ready for them."""
    data = Quarantine(job.data)
    if args.checkpoint_activations:
        recompute_activations(job.model)
    if should_compile(args.compile, args.model, precision.device):
        sample = {key: value for key, value in data[0, 0].items() if key != UNREADABLE}
        samples = [sample] * min(args.batch_size, len(data))
        compile_training(job.model, job.step, samples, precision)
    batches = TrainingBatches(len(data), args.batch_size, args.seed, job.balanced)
    return loader_for(data, args.num_workers, batch_sampler=batches, collate_fn=collate)


def recipe_of(args: Namespace, job: Job) -> engine.Recipe:
    """What the flags say about training on the samples of `job`."""
    total = args.epochs * len(job.data)
    return engine.Recipe(
        seed=args.seed,
        total_samples=total,
        warmup_samples=warmup_length(total, args.epochs) if args.warmup else 0,
        accumulation_steps=args.accumulation_steps,
        clip_max_norm=args.clip_max_norm,
        decay_at=job.decay_at,
        most_unreadable=most_unreadable(len(job.data)),
    )


def counts(batches: TrainingBatches, unreadable: int) -> dict[str, int]:
    """What became of the samples listed: seen, quarantined, or skipped with the incomplete step."""
    places = len(batches) * batches.samples_per_step
    return {
        "listed": batches.num_samples,
        "seen": places - unreadable,
        "skipped": batches.num_samples - places,
        "quarantined": unreadable,
    }


@contextmanager
def blamed_on(path: Path | None) -> Iterator[None]:
    """A context in which what a checkpoint lacks or holds in another form is a ValueError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        if path is None:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path}: its training state is not as u-sam.py writes it ({reason:.100})"
        ) from error


def check_saved(args: Namespace, saved: dict[str, Any], facts: dict[str, Any]) -> None:
    """Say in what this run differs from the one that `saved` is of.

    Raises ValueError if that changes the result and --override was not given, or if training
    cannot go on from `saved`.
    """
    if "optimizer" not in saved:
        raise ValueError(
            f"{args.resume} holds weights only; go on from last.pth, or evaluate it with --eval"
        )
    before = {"arguments": saved["args"], "data": saved["data"], **saved.get("manifest", {})}
    decisive = flags.DEFAULTS[args.model].keys() - flags.NOT_DECISIVE
    result, rest = manifest.differences(before, facts, decisive)
    if result and not args.override:
        raise ValueError(
            f"{args.resume} was trained otherwise: {'; '.join(result)}; leave that as it was, or "
            "give --override to go on with it"
        )
    if result:
        say(f"--override: goes on, and the result changes: {'; '.join(result)}")
    if rest:
        say(f"otherwise than before: {'; '.join(rest)}")


def restore(
    saved: dict[str, Any], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Put optimizer, scaler and random generators where `saved` has them; rates as in the flags."""
    given = [(group["base_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    for group, (rate, decay) in zip(optimizer.param_groups, given, strict=True):
        group.update(base_lr=rate, weight_decay=decay)  # of this run, as given or as saved
    if saved["scaler"]:  # empty unless it was float16 that was trained with
        scaler.load_state_dict(saved["scaler"])
    checkpoint.restore_random_state(saved["rng"])


def one_line(
    line: Mapping[str, Any], figures: Mapping[str, float | None], seconds: float, *, is_best: bool
) -> str:
    """An epoch's figures for the terminal; `line` as in log.jsonl, `figures` its scores by name."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    text = f"epoch {line['epoch']}: loss {loss}"
    if figures:
        shown = [f"{name} {value:.3f}" for name, value in figures.items() if value is not None]
        source = f" (prompts: {line['val']['prompts']})" if "prompts" in line["val"] else ""
        text += f", validation Dice{source} " + ", ".join(shown)
        text += " (best)" if is_best else ""
    if line["skipped_steps"]:
        text += f", {line['skipped_steps']} steps left out (gradients not finite)"
    if line["quarantined"]:
        text += f", {line['quarantined']} samples unreadable"
    return text + f", {seconds:.0f} s"
