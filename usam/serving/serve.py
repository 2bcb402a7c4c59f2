"""--serve and --annotate: load the model, open the port, serve until Ctrl-C."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import webbrowser
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dataset.files import locked, sweep
from dataset.scans.find import find_scans
from dataset.text import counted
from usam.cli.flags import LOCAL
from usam.prediction.results import without_results
from usam.prediction.windows import MAX_CACHE_BYTES
from usam.runtime.precision import Precision
from usam.runtime.processes import say, world_size
from usam.serving.annotate import Annotation, describe
from usam.serving.http_server import Server
from usam.serving.model import load
from usam.serving.remote import Remote
from usam.serving.worklist import WorkList

KEY_VARIABLE = "NN_INTERACTIVE_API_KEY"  # the client reads it as well


def serve(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> None:
    """Serve viewers, or the page of --annotate, until Ctrl-C or SIGTERM.

    Raises ValueError for an address in use, one without a key that others can reach, several
    processes, and a model without prompts.
    """
    if world_size() > 1:
        raise ValueError("--serve and --annotate run in one process; start them without torchrun")
    key = args.serve_key or os.environ.get(KEY_VARIABLE) or None
    if args.annotate:
        annotate(args, precision, saved, key)
        return
    remote = Remote(load(args, precision, saved), max_sessions=args.max_sessions,
                    orientation=args.orientation)  # fmt: skip
    with Server(args.serve, remote.routes(), key=key, tick=remote.leases.end_old) as server:
        host, port = args.serve
        memory = f"its image, and up to {MAX_CACHE_BYTES >> 20} MiB of embeddings each"
        say(f"serving {remote.model.name} at http://{host}:{port} for "
            f"{counted(args.max_sessions, 'client')} ({memory}){', with a key' if key else ''}; "
            "press Ctrl-C to stop")  # fmt: skip
        run_until_stopped(server)


def annotate(
    args: Namespace, precision: Precision, saved: dict[str, Any] | None, key: str | None
) -> None:
    """Display the scans of --annotate in the browser; everything is saved below --output_dir."""
    found = find_scans(args.annotate)
    scans = without_results(found, args.annotate)
    if not scans:
        raise ValueError("--annotate: no scans but results of earlier predictions")
    classes = args.classes or (saved["data"]["classes"][1:] if args.model == "u-sam" else ())
    with locked(args.output_dir, "annotating"):
        sweep(args.output_dir)
        work = WorkList.open(args.output_dir, scans, classes)
        sweep(work.labels_folder)
        page = Annotation(work, load(args, precision, saved), args.channel)
        host, port = args.serve or LOCAL
        key = key or secrets.token_urlsafe(16)  # other users of this machine may not look
        with Server((host, port), page.routes(), key=key, tick=page.tick) as server:
            address = f"http://{host}:{port}/#key={key}"
            say(f"{describe(work)}; saving in {args.output_dir}\nopen {address}")
            say("press Ctrl-C to stop")
            if sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
                webbrowser.open(address)
            try:
                run_until_stopped(server)
            finally:
                page.write()


def run_until_stopped(server: Server) -> None:
    """Serve requests until Ctrl-C or SIGTERM."""
    with stopped_by_sigterm():
        try:
            server.serve_forever(poll_interval=0.5)
        except KeyboardInterrupt:
            say("server stopped")


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Context manager in which SIGTERM acts like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = (signal.SIGTERM, signal.SIGINT)  # SIGINT may be ignored in a background job
    before = {number: signal.signal(number, signal.default_int_handler) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
