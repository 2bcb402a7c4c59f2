"""A training run: its setup, when it ends, and what each epoch logs, saves and prints.

The loop over epochs is in u-sam.py.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

from dataset.text import counted
from usam.cli.choices import DATASET_DEFAULTS, OUTPUT_DIR
from usam.evaluation.metrics import rank_score
from usam.runtime import processes
from usam.runtime.loaders import UNREADABLE, SkipUnreadable, max_unreadable, training_loader
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.runtime.signals import STOPPED, StoppableBatches, StopRequest
from usam.training import manifest
from usam.training.checkpoint import (
    CheckpointWriter,
    Progress,
    TrainingState,
    checkpoint_errors,
)
from usam.training.curves import RunCurves, summary_writer
from usam.training.ema import WeightAverage
from usam.training.engine import Recipe
from usam.training.epoch_sums import EpochSums
from usam.training.execution import checkpoint_activations, compile_training, should_compile
from usam.training.optimizer import build_optimizer, warmup_length
from usam.training.resume import best_so_far
from usam.training.run_folder import RunFolder
from usam.training.sam_med3d import SamMed3dTask
from usam.training.usam import USamTask
from usam.weights.checkpoint_parts import check_parts

Task = USamTask | SamMed3dTask
Saved = dict[str, Any] | None


class Run:
    """A training run of a task, fresh or resumed from `saved`.

    model: the task's, wrapped where there are several processes. loader: of training batches.
    recipe: how an epoch is trained. state: all that training changes. From here on, signals are
    noted by `stop`, and the run ends where all processes agree. plan: of --recipe auto, kept in
    the checkpoints.
    """

    def __init__(
        self, args: Namespace, precision: Precision, task: Task, saved: Saved, stop: StopRequest,
        plan: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if args.tensorboard:
            summary_writer()  # or an error, before an earlier run's files are moved
        self.args, self.task, self.stop = args, task, stop
        prepare_model(args, precision, task)
        self.loader = training_loader(
            task.train_data, batch_size=args.batch_size, num_workers=args.num_workers,
            seed=args.seed, balanced=task.balanced,
        )  # fmt: skip
        facts = manifest.facts_of(
            vars(args), task.info, world_size=processes.world_size(), precision=str(precision)
        )
        facts |= {"plan": plan} if plan else {}
        flags = json.dumps([facts["arguments"], facts["data"], str(precision)])
        processes.check_same(flags, "the flags, the precision or the listings of the data")
        self.recipe = recipe_of(args, task)
        optimizer = build_optimizer(task.parameter_groups(), args.weight_decay)
        average = WeightAverage(task.model, args.ema)
        self.state = TrainingState(task.model, optimizer, precision.scaler(), average, facts)
        if saved:
            self._resume(saved)
        if args.start_epoch is not None:
            self._start_at(args.start_epoch)
        check_parts(self.state.state_dict(), args.output_dir / "last.pth")  # as --resume will
        self._open_folder()
        self.model = processes.wrap(task.model, precision.device)
        self._steps, self._started = 0, time.perf_counter()
        stop.watch()
        if self.is_over:
            done = f"{self.state.progress.epoch} epochs are done, --epochs is {args.epochs}"
            say(f"nothing left to train: {done}; pass a larger --epochs to continue")

    def _resume(self, saved: dict[str, Any]) -> None:
        """Continue from `saved`, within an epoch even if the batch size has changed."""
        with checkpoint_errors(self.args.resume):
            manifest.check_unchanged(self.args, saved, self.state.facts)
            self.state.load_state_dict(saved)
            batches, progress = self.loader.batch_sampler, self.state.progress
            then = saved.get("manifest", {}).get("samples_per_step", batches.samples_per_step)
            step = progress.step * then // batches.samples_per_step
            progress.step = min(step, len(batches))

    def _start_at(self, epoch: int) -> None:
        """Continue with the first batch of an epoch."""
        batches = self.loader.batch_sampler
        samples = epoch * len(batches) * batches.samples_per_step
        self.state.progress = Progress(epoch=epoch, samples=samples)
        self.state.in_epoch = self.state.unvalidated = None

    def _open_folder(self) -> None:
        """Open --output_dir and write manifest.json."""
        args, state = self.args, self.state
        first = state.unvalidated["epoch"] if state.unvalidated else state.progress.epoch
        self.folder = RunFolder(args.output_dir, args.resume, first)
        self.folder.describe(
            state.facts, {"resumed": args.resume and str(args.resume), **vars(state.progress)}
        )
        self.writer = CheckpointWriter(args.output_dir, keep=args.keep)
        self.curves = RunCurves(args.output_dir, tensorboard=args.tensorboard, first_epoch=first)
        state.best = best_so_far(state.best, args.resume, args.output_dir)

    @property
    def is_over(self) -> bool:
        """Whether all epochs are trained and validated."""
        return self.state.progress.epoch >= self.args.epochs and not self.state.unvalidated

    def begin_epoch(self) -> None:
        """Save and exit if a stop signal was received."""
        if self.stop.asked(at_once=True):
            self.exit_stopped()
        self._started = time.perf_counter()

    def after_step(self, sums: EpochSums) -> bool:
        """Save if --save_every is due; returns whether a signal asks to stop here."""
        self._steps += 1
        if self.stop.asked():
            self.state.in_epoch = sums.state_dict()
            return True
        if self.args.save_every and self._steps % self.args.save_every == 0:
            self.state.in_epoch = sums.state_dict()
            self.writer.save(self.state.state_dict, as_best=False, may_skip=False)
        return False

    def end_training(self, figures: dict[str, Any] | None) -> None:
        """Keep an epoch's figures until it is validated; exit if a signal stopped it early."""
        if figures is None:
            self.exit_stopped()
        self.state.unvalidated = figures | counts(self.loader.batch_sampler, figures["unreadable"])
        processes.broadcast_buffers(self.task.model)
        processes.check_same_weights(self.task.model, figures["epoch"])

    def validate(self) -> dict[str, Any] | None:
        """The epoch's scores on the held-out cases, None without any; exits on a stop signal."""
        if self.stop.asked(at_once=True):
            self.exit_stopped()
        scores = None
        if self.task.val_loader:
            with self.state.average.in_use():
                scores = self.task.validate(StoppableBatches(self.task.val_loader, self.stop))
        if self.stop.agreed:  # perhaps within the validation, which is then incomplete
            self.exit_stopped()
        return scores

    def save_epoch(self, scores: dict[str, Any] | None) -> None:
        """Log, draw, print and save an epoch; as best.pth too, if it has the best score so far."""
        state, best = self.state, self.state.best
        line, state.unvalidated = dict(state.unvalidated), None
        score = None
        if scores:
            line["val"], score = scores, scores["mean_dice"]
        is_best = best["epoch"] is None or rank_score(score) > rank_score(best["mean_dice"])
        if is_best or not scores:
            best.update(epoch=line["epoch"], mean_dice=score)
        self.folder.log(line)
        self.curves.add(line, last=self.is_over)
        figures = self.task.scores_to_print(scores) if scores else {}
        seconds = time.perf_counter() - self._started
        say(epoch_line(line, figures, seconds, is_best=is_best))
        self.writer.save(
            state.state_dict,
            as_best=is_best or not scores,
            may_skip=not (is_best and scores) and not self.is_over,
        )

    def finish(self) -> None:
        """Wait until all checkpoints are on the disk; print the best epoch and the next command."""
        self.writer.finish()
        args, best, folder = self.args, self.state.best, self.args.output_dir
        if best["mean_dice"] is not None:
            say(f"best epoch: {best['epoch']} with a validation Dice of {best['mean_dice']:.4f}")
        elif best["epoch"] is not None:
            say(f"best epoch: {best['epoch']}, the last one; there were no validation scores")
        pictures = f"; curves: {folder / 'curves.png'}" if (folder / "curves.png").exists() else ""
        say(f"checkpoints: {folder / 'best.pth'} and last.pth{pictures}")
        has_test_cases = any(case["split"] == "test" for case in self.task.train_data.store.cases)
        say(f"next: {next_command(args, has_test_cases=has_test_cases)}")

    def exit_stopped(self) -> NoReturn:
        """Save, wait for the disk and for all processes, and exit with code STOPPED."""
        state, folder = self.state, self.args.output_dir
        self.writer.save(state.state_dict, as_best=False, may_skip=False)
        self.writer.finish()
        self.stop.wait_for_all()
        epoch, step = state.progress.epoch, state.progress.step
        where = f"before epoch {epoch}"
        if step:
            where = f"in epoch {epoch} after {counted(step, 'batch')}"
        if state.unvalidated:
            where = f"before the validation of epoch {epoch - 1}"
        say(f"stopped by a signal {where}; resume with --resume {folder / 'last.pth'}")
        sys.exit(STOPPED)


def next_command(args: Namespace, *, has_test_cases: bool) -> str:
    """The command that evaluates a run's best.pth, or predicts where there are no test cases."""
    best = str(args.output_dir / "best.pth")
    if not has_test_cases and args.fold is None:
        return shlex.join(["python", "u-sam.py", "--predict", "SCAN.nii.gz", "--resume", best])
    roots = args.data_root if isinstance(args.data_root, list) else [args.data_root]
    words = ["python", "u-sam.py", "--dataset", args.dataset]
    words += ["--data_root", *map(str, roots)] if args.data_root else []
    words += ["--fold", str(args.fold)] if args.fold is not None else []
    words += ["--eval", "--resume", best]
    words += ["--classes", *args.classes] if args.classes else []
    if args.output_dir != DATASET_DEFAULTS.get(args.dataset, {}).get("output_dir", OUTPUT_DIR):
        words += ["--output_dir", str(args.output_dir)]
    return shlex.join(words)


def prepare_model(args: Namespace, precision: Precision, task: Task) -> None:
    """Apply the cache of embeddings, activation checkpointing and compilation, as flags say."""
    if args.model == "u-sam" and args.cache_embeddings:
        task.cache_embeddings()
    if args.checkpoint_activations:
        checkpoint_activations(task.model)
    if should_compile(args.compile, args.model, precision.device):
        sample = SkipUnreadable(task.train_data)[0, 0]
        sample.pop(UNREADABLE, None)
        samples = [sample] * min(args.batch_size, len(task.train_data))
        compile_training(task.model, task.step, samples, precision)


def recipe_of(args: Namespace, task: Task) -> Recipe:
    """The settings for training an epoch of the task, from the flags."""
    num_samples = len(task.train_data)
    total = args.epochs * num_samples
    return Recipe(
        seed=args.seed,
        total_samples=total,
        warmup_samples=warmup_length(total, args.epochs) if args.warmup else 0,
        accumulation_steps=args.accumulation_steps,
        clip_max_norm=args.clip_max_norm,
        decay_at=task.decay_at,
        most_unreadable=max_unreadable(num_samples),
    )


def counts(batches: Any, unreadable: int) -> dict[str, int]:
    """Samples of an epoch: listed, seen, and skipped with its incomplete last step.

    Together with the unreadable ones, those seen and skipped are all that are listed.
    """
    in_steps = len(batches) * batches.samples_per_step
    return {
        "listed": batches.num_samples,
        "seen": in_steps - unreadable,
        "skipped": batches.num_samples - in_steps,
    }


def epoch_line(
    line: Mapping[str, Any], scores: Mapping[str, float | None], seconds: float, *, is_best: bool
) -> str:
    """An epoch's figures for the terminal; `line` as in log.jsonl, `scores` by name."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    text = f"epoch {line['epoch']}: loss {loss}"
    if scores:
        shown = [f"{name} {value:.3f}" for name, value in scores.items() if value is not None]
        source = f" (prompts: {line['val']['prompts']})" if "prompts" in line["val"] else ""
        text += f", validation Dice{source} " + ", ".join(shown)
        text += " (best)" if is_best else ""
    if line["skipped_steps"]:
        text += f", {counted(line['skipped_steps'], 'step')} skipped (gradients not finite)"
    if line["unreadable"]:
        text += f", {counted(line['unreadable'], 'sample')} unreadable"
    return text + f", {seconds:.0f} s"
