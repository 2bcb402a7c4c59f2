"""One run of the race in a process of its own, on its own core: train, predict, score, write.

    python -m benchmarks.race.row TASK.json

The time of training begins with the process, as a user would wait, and ends before the prediction.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

STARTED = time.monotonic()


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, task["cores"])

    import torch  # after the pinning: it counts the cores

    from benchmarks.race.rows import NNUNET, UNET, Row, Run
    from dataset.files import atomic_write
    from dataset.store.slices import SliceStore

    torch.set_num_threads(len(task["cores"]))
    run = Run(**{**task["run"], "row": Row(**task["run"]["row"])})
    data, folder = Path(task["data"]), Path(task["folder"])
    store = data / "store"
    if run.row.kind == UNET:
        from benchmarks.race.unet_row import UNetRow

        row = UNetRow(run, store, STARTED)
        trained, labels = row.train(), row.predict(run.split)
    elif run.row.kind == NNUNET:
        from benchmarks.race import nnunet_row

        trained = nnunet_row.train(run, data, folder, Path(task["nnunet"]))
        labels = nnunet_row.predict(run, data, folder, Path(task["nnunet"]))
    else:
        from benchmarks.race import usam_row

        trained = usam_row.train(run, store, folder)
        labels = usam_row.predict(folder, store, run.split)
    from benchmarks.race.scores import score

    opened = SliceStore(store)
    result: dict[str, Any] = {
        "settings": run.settings(), "title": run.row.title, "commit": task["commit"],
        "date": date.today().isoformat(), "seed": run.seed, **trained,
        "classes": opened.classes[1:], "patients": score(opened, labels, run.split),
    }  # fmt: skip
    with atomic_write(Path(task["result"])) as part:
        part.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
