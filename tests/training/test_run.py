"""What a run prints of an epoch."""

from __future__ import annotations

from usam.training.run import epoch_line


def test_an_epoch_line_names_its_scores_and_the_source_of_the_prompts() -> None:
    line = {
        "epoch": 3, "loss": 0.5, "skipped_steps": 1, "unreadable": 2, "val": {"prompts": "boxes"},
    }  # fmt: skip
    assert epoch_line(line, {"tumour": 0.7, "bone": None}, 2.0, is_best=True) == (
        "epoch 3: loss 0.5000, validation Dice (prompts: boxes) tumour 0.700 (best), "
        "1 step skipped (gradients not finite), 2 samples unreadable, 2 s"
    )
    line = {"epoch": 0, "loss": None, "skipped_steps": 0, "unreadable": 0}
    assert epoch_line(line, {}, 0.4, is_best=True) == "epoch 0: loss not finite, 0 s"
