"""Which fold a checkpoint was trained with, so that no model is scored on cases it has seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_start(
    path: Path, content: Mapping[str, Any], fold: int | None, data: Mapping[str, Any]
) -> None:
    """Raises ValueError if --init, a checkpoint's content, has seen cases of the run's `fold`.

    data: what the run's checkpoints say of it. A checkpoint of the same store must have been
    trained with the same fold, and one of the same data set prepared differently with that fold
    or none.
    """
    theirs = content["data"]
    same_store = theirs.get("digest") is not None and theirs["digest"] == data["digest"]
    same_set = theirs.get("dataset") is not None and theirs["dataset"] == data["dataset"]
    in_folds = same_set and content["args"].get("fold") is not None
    if fold is not None and (same_store or in_folds):
        check_fold(f"--init {path}", content, fold, data["fold_digest"])


def check_fold(name: str, content: Mapping[str, Any], fold: int, digest: str | None) -> None:
    """Raises ValueError unless the checkpoint `content` was trained without the cases of `fold`.

    name: what errors call it. digest: of the cases in the fold; older checkpoints have none and
    are compared by the fold's number alone.
    """
    trained, known = content["args"].get("fold"), content["data"].get("fold_digest")
    if trained != fold:
        on = "without --fold" if trained is None else f"with --fold {trained}"
        raise ValueError(f"--fold {fold}: {name} was trained {on} and has seen these cases")
    if known and digest and known != digest:
        raise ValueError(
            f"--fold {fold}: {name} was trained with another fold {fold} and has seen these cases; "
            "the store was prepared again with other --folds, --seed or cases"
        )
