"""Who trains and who validates: the draw, its balance, and the earlier rule."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from dataset.splits import balanced, cross_validation, held_out, held_out_before

NAMES = [f"case{number:02d}" for number in range(20)]


def test_the_draw_depends_on_ids_and_seed_alone() -> None:
    wanted = set(np.random.default_rng(7).permutation(NAMES)[:4].tolist())
    assert held_out(NAMES[::-1], 0.2, 7) == held_out(NAMES, 0.2, 7) == wanted
    assert held_out(NAMES, 0.2, 8) != wanted


def test_at_least_two_cases_train() -> None:
    assert len(held_out(NAMES[:6], 0.9, 1)) == 4
    assert len(held_out(NAMES[:3], 0.34, 1)) == 1
    assert held_out(NAMES[:2], 0.5, 1) == set()


@pytest.mark.parametrize("seed", range(5))
def test_the_earlier_rule_held_out_none_of_few_cases(seed: int) -> None:
    assert held_out_before(NAMES[:6], 0.9, seed) == held_out_before(NAMES[:3], 0.34, seed) == set()
    assert held_out_before(NAMES, 0.3, seed) == held_out(NAMES, 0.3, seed)


def counts(part: set[str], shows: Mapping[str, set[int]]) -> list[int]:
    """How many of the cases show foreground, class 1, class 2."""
    return [sum(bool(shows[name]) for name in part)] + [
        sum(label in shows[name] for name in part) for label in (1, 2)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_both_sides_show_every_class_where_two_cases_do(seed: int) -> None:
    empty = {name: {1} if number % 2 else set() for number, name in enumerate(NAMES[:8])}
    (one,) = held_out(empty, 0.1, seed, empty)  # one case validates
    assert empty[one] == {1}
    rare = {name: {1} for name in NAMES} | {NAMES[3]: {1, 2}, NAMES[11]: {2}}
    drawn = held_out(rare, 0.1, seed, rare)
    assert len(drawn) == 2
    assert all(counts(drawn, rare)) and all(counts(set(NAMES) - drawn, rare))


@pytest.mark.parametrize("seed", range(20))
def test_a_draw_that_lacks_nothing_stays_as_it_is(seed: int) -> None:
    everything = {name: {1, 2} for name in NAMES}
    assert held_out(NAMES, 0.2, seed, everything) == held_out(NAMES, 0.2, seed)
    assert cross_validation(NAMES, 5, seed, everything) == cross_validation(NAMES, 5, seed)
    once = {name: {1} for name in NAMES} | {NAMES[5]: {1, 2}}  # class 2 cannot be on both sides
    assert held_out(NAMES, 0.2, seed, once) == held_out(NAMES, 0.2, seed)


@pytest.mark.parametrize("seed", range(10))
def test_folds_share_what_few_cases_show(seed: int) -> None:
    shows = {name: {1} if number < 5 else set() for number, name in enumerate(NAMES)}
    shows[NAMES[19]] = shows[NAMES[18]] = {2}
    folds = [set(fold["val"]) for fold in cross_validation(NAMES, 5, seed, shows)]
    assert set.union(*folds) == set(NAMES) and sum(map(len, folds)) == 20
    assert [counts(fold, shows)[1] for fold in folds] == [1] * 5
    assert sum(counts(fold, shows)[2] > 0 for fold in folds) == 2


def test_parts_keep_their_sizes() -> None:
    shows = {name: {1} if name in ("a", "b") else set() for name in "abcdef"}
    parts = balanced([["a", "b"], ["c", "d", "e"], ["f"]], shows)
    assert sorted(map(len, parts)) == [1, 2, 3]
    assert sum(bool({"a", "b"} & set(part)) for part in parts) == 2
