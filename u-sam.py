"""Train, evaluate and resume U-SAM on CT slices, or SAM-Med3D on volumes; predict with both.

    python u-sam.py --epochs 100 --batch_size 24 --dataset rectum
    torchrun --nproc_per_node=8 u-sam.py --num_workers 4 --epochs 100 --batch_size 24
    python u-sam.py --dataset rectum --eval --resume chkpt/best.pth
    python u-sam.py --predict SCAN.nii.gz --resume chkpt/best.pth --output_dir predictions
    python u-sam.py --dataset phantom --sam_weight none --img_size 112    (no data, no weights)
    python u-sam.py --model sam-med3d --dataset volumes --data_root ROOT
    python u-sam.py --serve --resume chkpt/best.pth    (clicks from 3D Slicer and napari)
    python u-sam.py --model sam-med3d --predict SCAN.nii.gz --resume chkpt/best.pth --point 90 81 40

Reads from top to bottom: flags, checkpoint, then prediction, evaluation or the loop over epochs.
Exit codes: 0 done, 2 bad input, 75 stopped by a signal with all saved (resume with --resume auto),
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Any, NoReturn

BAD_INPUT, INTERRUPTED, NO_READER = 2, 130, 141  # exit codes
PACKAGES = {"cv2": "opencv-python-headless", "yaml": "pyyaml"}


def main(args: Namespace) -> None:
    """One run, from parsed flags: find the checkpoint, then predict, evaluate or train.

    Imports that take seconds, torch first, come after the flags, so that --help and mistyped flags
    answer at once.
    """
    from dataset.text import counted
    from usam.cli.parser import fill_defaults, is_training
    from usam.runtime import peers, processes
    from usam.runtime.precision import select_precision
    from usam.training.resume import find_checkpoint
    from usam.weights.inference import averaged

    device = processes.start(args.device, num_processes=args.world_size, dist_url=args.dist_url)
    args.resume, saved = find_checkpoint(
        args.resume, args.output_dir, args.sam_weight, more=bool(args.ensemble)
    )
    fill_defaults(args, saved)
    if saved and not is_training(args):
        saved = averaged(saved)
    precision = select_precision(args.amp, device)
    number = counted(processes.world_size(), "process")
    processes.say(f"{number} on {device.type}, {precision}")
    with peers.watched():
        if args.merge:
            merge(args)
        elif args.export_lora or args.export_weights:
            export(args, saved)
        elif args.predict:
            predict(args, precision, saved)
        elif args.serve or args.annotate:
            serve(args, precision, saved)
        elif args.eval:
            evaluate(args, precision, saved)
        else:
            train(args, precision, saved)


def train(args: Namespace, precision: Any, saved: dict[str, Any] | None) -> None:
    """Train, validate and save each epoch until --epochs; a signal saves and ends the run."""
    from usam.planning.recipe import settle
    from usam.runtime.signals import StopRequest
    from usam.training.engine import train_one_epoch
    from usam.training.run import Run
    from usam.training.run_folder import training_lock
    from usam.training.sam_med3d import SamMed3dTask
    from usam.training.usam import USamTask

    with StopRequest() as stop:
        plan = settle(args, precision, saved)
        make_task = SamMed3dTask if args.model == "sam-med3d" else USamTask
        task = make_task(args, precision, saved)
        task.describe()
        with training_lock(args.output_dir):
            run = Run(args, precision, task, saved, stop, plan)
            while not run.is_over:
                run.begin_epoch()
                if not run.state.unvalidated:  # else the run was stopped before its validation
                    figures = train_one_epoch(
                        run.model, run.loader, run.state, step=task.step, recipe=run.recipe,
                        precision=precision, after_step=run.after_step,
                    )  # fmt: skip
                    run.end_training(figures)
                scores = run.validate()
                run.save_epoch(scores)
            run.finish()


def evaluate(args: Namespace, precision: Any, saved: dict[str, Any] | None) -> None:
    """Score the checkpoint on the test cases; print and write the report."""
    if args.model == "sam-med3d":
        from usam.evaluation import clicks as evaluation
    else:
        from usam.evaluation import slices as evaluation
    evaluation.evaluate(args, precision, saved)


def predict(args: Namespace, precision: Any, saved: dict[str, Any] | None) -> None:
    """Segment the scans of --predict."""
    from usam.prediction.predict import predict

    predict(args, precision, saved)


def serve(args: Namespace, precision: Any, saved: dict[str, Any] | None) -> None:
    """Serve the viewers, or the page of --annotate, until Ctrl-C."""
    from usam.serving.serve import serve

    serve(args, precision, saved)


def merge(args: Namespace) -> None:
    """Write one report of the cases in all folders of --merge."""
    from usam.evaluation.merge import merge

    merge(args)


def export(args: Namespace, saved: dict[str, Any]) -> None:
    """Write weights of --resume for other programs."""
    from usam.weights.export import export

    export(args, saved)


def end(code: int, message: str = "") -> NoReturn:
    """Print `message` on one line and exit with `code`; if there are several processes, at once."""
    from usam.cli.parser import one_line

    if message:
        print(one_line(f"u-sam.py: {message}"), file=sys.stderr, flush=True)
    if peers := sys.modules.get("usam.runtime.peers"):
        peers.end(code)
    sys.exit(code)


def end_by(error: Exception) -> NoReturn:
    """Exit with one line if input or machine caused the error; raise it again if it is a bug."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and package not in ("", "usam", "dataset"):
        install = f"pip install {PACKAGES.get(package, package)}"
        end(BAD_INPUT, f"error: {error}; install it with: {install}")
    try:
        from dataset.errors import reason
    except Exception:  # torch is installed, but cannot be loaded
        end(BAD_INPUT, f"error: {error}")
    if line := reason(error):
        end(BAD_INPUT, f"error: {line}")
    if peers := sys.modules.get("usam.runtime.peers"):
        peers.end_by(error)
    raise error


def run_command() -> None:
    """Parse the flags and run; bad input and Ctrl-C exit with one line, a closed pipe silently."""
    try:
        from usam.cli.parser import parse_flags

        main(parse_flags())
    except KeyboardInterrupt:
        end(INTERRUPTED, "interrupted")
    except BrokenPipeError:  # whoever read the output has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end(NO_READER)
    except Exception as error:
        end_by(error)
    finally:
        if processes := sys.modules.get("usam.runtime.processes"):
            processes.stop()


if __name__ == "__main__":
    run_command()
