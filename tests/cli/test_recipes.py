"""What --recipe sets: loss terms, sampling, augmentation, and how flags combine.

Whole runs go through u-sam.py on a small store; the rest is checked by hand-computed numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset import transforms
from dataset.transforms import StrongDraws
from tests.helpers.command import TINY, assert_same_run, run
from usam.cli import parser
from usam.cli.choices import RECIPES
from usam.cli.values import jitter_pixels
from usam.runtime.samplers import ClassBalancedSampling, TrainingBatches
from usam.training.losses import balanced_weights, class_weights

EVERYTHING = (
    "--recipe", "strong", "--augment", "strong", "--foreground_share", "50%", "--ema", "0.9",
    "--class_weights", "balanced", "--input", "2.5d",
    "--prompt_mode", "mixed", "--prompt_jitter", "5%", "--epochs", "3",
    "--batch_size", "4", "--val_fraction", "0.34", "--dataset", "store",
)  # fmt: skip


# ------------------------------------------------------------------------------------ loss


def test_balanced_weights_by_hand() -> None:
    assert balanced_weights([400, 100]) == pytest.approx([2 / 3, 4 / 3])
    assert balanced_weights([400, 100, 0]) == pytest.approx([0.6, 1.2, 1.2])


def test_class_weights_are_named_or_given() -> None:
    assert class_weights("none", [9, 1]) is None
    assert class_weights("balanced", [9, 1]) == pytest.approx([0.5, 1.5])
    assert class_weights("1,2.5", [9, 1]) == [1, 2.5]
    for wrong in ("1,2,3", "0,0"):
        with pytest.raises(ValueError, match="wanted 2 numbers"):
            class_weights(wrong, [9, 1])


def test_jitter_is_in_pixels_or_percent_of_the_side() -> None:
    assert jitter_pixels("3", 224) == 3
    assert jitter_pixels("2.5%", 200) == 5


# -------------------------------------------------------------------------------- sampling


def epoch_of(batches: TrainingBatches) -> list[int]:
    return [index for batch in batches for index, _ in batch]


def test_balanced_samples_take_the_places_of_others() -> None:
    rare, common = np.array([3]), np.arange(100, 200)
    plain = TrainingBatches(1000, 4, seed=5)
    balanced = TrainingBatches(
        1000, 4, seed=5, balanced=ClassBalancedSampling(0.4, [rare, np.array([], int), common])
    )
    before, after = np.array(epoch_of(plain)), np.array(epoch_of(balanced))
    assert len(after) == 1000
    changed = before != after
    assert changed.mean() == pytest.approx(0.4, abs=0.05)
    assert (after[changed] == 3).mean() == pytest.approx(0.5, abs=0.07)
    assert set(after[changed]) <= {3, *common}


def test_no_share_leaves_the_published_order() -> None:
    groups = [np.arange(5)]
    none = TrainingBatches(20, 4, seed=5, balanced=ClassBalancedSampling(0.0, groups))
    assert epoch_of(none) == epoch_of(TrainingBatches(20, 4, seed=5))
    empty = TrainingBatches(20, 4, seed=5, balanced=ClassBalancedSampling(1.0, [np.array([], int)]))
    assert epoch_of(empty) == epoch_of(TrainingBatches(20, 4, seed=5))


def test_a_balanced_epoch_is_entered_in_the_middle() -> None:
    batches = TrainingBatches(20, 4, seed=5, balanced=ClassBalancedSampling(0.5, [np.arange(3)]))
    batches.epoch = 2
    whole = list(batches)
    batches.first_step = 3
    assert list(batches) == whole[3:]
    batches.epoch, batches.first_step = 1, 0
    assert list(batches) != whole


# ---------------------------------------------------------------------------- augmentation


def strong(num: int = 1, **changes: Any) -> StrongDraws:
    """Draws that change nothing but what `changes` say."""
    draws = StrongDraws(
        torch.zeros(num), torch.ones(num), torch.zeros(num, 2), torch.ones(num), torch.zeros(num), 1
    )
    return draws._replace(**{name: torch.tensor(value) for name, value in changes.items()})


def block(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(1, size, size, dtype=torch.long)
    mask[0, 28:36, 20:44] = 2
    return mask[:, None].float().expand(-1, 3, -1, -1) / 2, mask


def test_neutral_draws_change_nothing() -> None:
    image, mask = torch.rand(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16))
    found, labels = transforms.apply_strong(image, mask, strong(2))
    torch.testing.assert_close(found, image, rtol=0, atol=1e-5)
    assert torch.equal(labels, mask)


def test_a_shift_moves_right_and_down_by_its_share_of_the_side() -> None:
    image, mask = block()
    found, labels = transforms.apply_strong(image, mask, strong(shift=[[0.125, 0.25]]))
    wanted = mask.roll((16, 8), dims=(1, 2))
    assert torch.equal(labels, wanted)
    torch.testing.assert_close(found[:, 1], wanted.float() / 2, rtol=0, atol=1e-5)


def test_a_scale_enlarges_image_and_mask_about_the_centre() -> None:
    image, mask = block()
    found, labels = transforms.apply_strong(image, mask, strong(scale=[1.5]))
    assert (labels > 0).sum() == 12 * 36
    assert ((found[:, 0] > 0.5) == (labels == 2)).float().mean() > 0.99


def test_an_angle_turns_clockwise_about_the_shifted_centre() -> None:
    image, mask = block()
    _, labels = transforms.apply_strong(image, mask, strong(angle=[90.0], shift=[[0.125, 0.0]]))
    y, x = labels[0].nonzero().float().mean(dim=0)
    assert (float(x), float(y)) == pytest.approx((31.5 + 8, 31.5), abs=0.6)
    assert (labels[0] > 0).any(dim=1).sum() == 24  # lies no more, but stands
    image, mask = block()
    mask[0, :, 32:] = 0  # what is left points to the left, and then up
    _, labels = transforms.apply_strong(image, mask, strong(angle=[90.0]))
    assert labels[0].nonzero().float().mean(dim=0)[0] < 31


def test_gamma_and_noise_change_the_image_only() -> None:
    image, mask = torch.full((1, 3, 64, 64), 0.25), block()[1]
    found, labels = transforms.apply_strong(image, mask, strong(gamma=[2.0]))
    torch.testing.assert_close(found, torch.full_like(found, 0.0625))
    noisy, _ = transforms.apply_strong(image, mask, strong(noise=[0.05]))
    assert (noisy - 0.25).std() == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(noisy[:, 0], noisy[:, 1])
    assert torch.equal(labels, mask)


def test_strong_draws_keep_their_ranges_and_repeat() -> None:
    draws = transforms.draw_strong(4000, torch.Generator().manual_seed(1))
    assert draws.angle.abs().max() <= 15
    assert 1 / 1.25 <= draws.scale.min() < draws.scale.max() <= 1.25
    assert draws.shift.abs().max() <= 0.1
    assert 1 / 1.4 <= draws.gamma.min() < draws.gamma.max() <= 1.4
    assert 0 <= draws.noise.min() < draws.noise.max() <= 0.06
    for values in (draws.angle, draws.shift[:, 1], draws.noise):
        assert (values == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert ((draws.shift[:, 0] == 0) == (draws.shift[:, 1] == 0)).all()
    image, mask = torch.rand(4, 1, 16, 16), torch.randint(0, 3, (4, 16, 16))
    first, again = (
        transforms.augment_strongly(image, mask, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].min() >= 0
    assert first[0].max() <= 1


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, a run with every option, and `short`, the same ended after one epoch of three."""
    from usam.training.checkpoint import CheckpointWriter

    folder = tmp_path_factory.mktemp("runs")
    save = CheckpointWriter.save

    def save_and_copy(self: CheckpointWriter, state: Any, *, as_best: bool, **_: bool) -> None:
        save(self, state, as_best=as_best, may_skip=False)
        self.finish()
        if len((self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1:
            shutil.copytree(self.folder, folder / "short")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CheckpointWriter, "save", save_and_copy)
        given = [*TINY, *EVERYTHING, "--data_root", store, "--output_dir", folder / "whole"]
        args = parser.parse_flags([str(word) for word in given])
        main = __import__("runpy").run_path("u-sam.py", run_name="u_sam")["main"]
        main(args)
    return folder


def test_a_run_with_every_option_resumes_exactly(
    runs: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    again = tmp_path / "again"
    shutil.copytree(runs / "short", again)
    result = run(
        capsys, "--device", "cpu", "--amp", "off", "--num_workers", "2", "--data_root", store,
        "--output_dir", again, "--resume", again / "last.pth",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert_same_run(again, runs / "whole")


def test_best_holds_the_average_and_last_both(runs: Path) -> None:
    best, last = (
        torch.load(runs / "short" / name, weights_only=True) for name in ("best.pth", "last.pth")
    )
    assert "average" not in best
    assert best["model"].keys() == last["model"].keys()
    name = "sam.mask_decoder.up1.up.weight"
    assert torch.equal(best["model"][name], last["average"]["weights"][name])
    assert not torch.equal(last["model"][name], last["average"]["weights"][name])
    assert last["average"]["num_updates"] == 3
    assert (best["data"]["input"], best["data"]["prompt_mode"]) == ("2.5d", "mixed")


def test_evaluation_uses_the_average_and_any_prompts(
    runs: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    found = []
    for name, more in (("best", []), ("last", []), ("last", ["--prompt_mode", "3"])):
        result = run(
            capsys, "--dataset", "store", "--data_root", store, "--device", "cpu", "--amp", "off",
            "--num_workers", "0", "--eval", "--resume", runs / "short" / f"{name}.pth",
            "--output_dir", tmp_path, *more,
        )  # fmt: skip
        assert result.code == 0, result.err
        found.append(json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")))
    assert [scores["prompts"].split()[0] for scores in found] == ["none", "none", "3"]
    assert found[0]["dice"] == found[1]["dice"]


def test_another_input_than_the_checkpoints_is_refused(
    runs: Path, store: Path, capsys: Any
) -> None:
    result = run(
        capsys, "--dataset", "store", "--data_root", store, "--eval", "--input", "2d",
        "--resume", runs / "short" / "best.pth",
    )  # fmt: skip
    assert result.code == 2
    assert "was trained with 2.5d" in result.err


# ------------------------------------------------------------------------------------ flags


def settled(*given: str, saved: dict[str, Any] | None = None) -> Any:
    args = parser.parse_flags(list(given))
    parser.fill_defaults(args, saved)
    return args


def test_a_recipe_sets_its_flags_and_given_ones_win() -> None:
    plain, strong_ = settled(), settled("--recipe", "strong", "--ema", "0.5")
    for name, value in RECIPES["published"].items():
        assert getattr(plain, name) == value
    for name, value in (RECIPES["strong"] | {"ema": 0.5}).items():
        assert getattr(strong_, name) == value
    assert RECIPES["strong"].keys() == RECIPES["published"].keys()


def test_the_phantom_has_defaults_of_its_own_that_flags_and_recipes_replace() -> None:
    words = (
        "--sam_weight none --img_size 112 --epochs 2 --batch_size 8 --lr 8e-4 --lr_vit 4e-5 "
        "--lr_backbone 1e-3 --warmup --augment strong --class_weights 1,2,4 --val_fraction 0.2 "
        "--output_dir chkpt/phantom"
    )
    short, written_out = (
        settled("--dataset", "phantom"),
        settled("--dataset", "phantom", *words.split()),
    )
    assert vars(short) == vars(written_out)
    other = settled("--dataset", "phantom", "--epochs", "7", "--output_dir", "x", "--lr", "1e-4")
    assert (other.epochs, str(other.output_dir), other.lr, other.batch_size) == (7, "x", 1e-4, 8)
    with_recipe = settled("--dataset", "phantom", "--recipe", "published")
    assert (with_recipe.epochs, with_recipe.warmup, with_recipe.augment) == (
        100,
        False,
        "published",
    )
    assert str(settled().output_dir) == "chkpt"


def test_a_resumed_run_keeps_its_values_unless_a_recipe_is_given() -> None:
    values = vars(settled("--recipe", "strong", "--ema", "0.5"))
    saved = {"args": {**values, "output_dir": "x"}, "data": {"img_size": 224}}
    assert settled("--resume", "x", saved=saved).ema == 0.5
    assert settled("--resume", "x", "--recipe", "published", saved=saved).ema == 0
    assert settled("--resume", "x", "--recipe", "published", "--ema", "0.9", saved=saved).ema == 0.9


def test_a_recipe_with_cached_embeddings_is_resumed_without_augmentation() -> None:
    words = ("--recipe", "strong", "--cache_embeddings", "c", "--tuning", "decoder")
    words += ("--adapter", "none")
    first = settled(*words)
    saved = {"args": vars(first), "data": {"img_size": 224}}
    assert first.augment == settled(*words, "--resume", "x", saved=saved).augment == "none"


@pytest.mark.parametrize(
    "given",
    [
        ["--ema", "1"], ["--class_weights", "1,x"], ["--class_weights", "-1,2"],
        ["--prompt_jitter", "-1"], ["--prompt_jitter", "100%"], ["--prompt_jitter", "x"],
        ["--prompt_mode", "4"], ["--prompt_mode", "some"], ["--foreground_share", "101%"],
        ["--input", "3d"], ["--recipe", "weak"],
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(given: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parser.parse_flags(given)
    assert given[0] in capsys.readouterr().err
