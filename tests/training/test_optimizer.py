"""The learning rate: the published factors, set in time, and bounds for every size of run.

Fixtures are recorded in tests/data; see there for how they were made.
"""

from __future__ import annotations

import itertools
import json

import pytest

from usam.training.optimizer import learning_rate_factor, warmup_length


@pytest.fixture(scope="module")
def schedule(recorded):
    return json.loads((recorded / "usam_lr_schedule.json").read_text(encoding="utf-8"))


def test_factor_before_a_step_is_what_the_published_code_sets_after_it(schedule):
    total = schedule["parameters"]["max_iter"]
    for row in schedule["no_warmup"]["rows"]:
        factor = learning_rate_factor(row["iter_num"], 8, total)
        assert factor == pytest.approx(row["factor_set_after_this_step"], abs=1e-12)


def test_warmup_ramps_with_the_current_batch_and_then_follows_the_published_code(schedule):
    total, epochs = schedule["parameters"]["max_iter"], schedule["parameters"]["epochs"]
    warmup = warmup_length(total, epochs)
    assert warmup == schedule["warmup"]["warmup_samples"] == 50
    rows = schedule["warmup"]["rows"]
    for row, following in itertools.pairwise(rows):
        factor = learning_rate_factor(row["iter_num"], 8, total, warmup=warmup)
        if following["iter_num"] < warmup:
            assert factor == pytest.approx(following["factor_set_after_this_step"], abs=1e-12)
        elif row["iter_num"] >= warmup:
            assert factor == pytest.approx(row["factor_set_after_this_step"], abs=1e-12)
        else:
            assert factor == 1.0


def test_values_by_hand():
    assert learning_rate_factor(0, 24, 100) == 1.0
    assert learning_rate_factor(50, 24, 100) == pytest.approx(0.5**0.9)
    assert learning_rate_factor(100, 24, 100) == 0.0
    assert learning_rate_factor(0, 5, 100, warmup=20) == 0.25
    assert learning_rate_factor(10, 5, 100, warmup=20) == 0.75
    assert learning_rate_factor(20, 5, 100, warmup=20) == 1.0
    assert learning_rate_factor(60, 5, 100, warmup=20) == pytest.approx(0.6**0.9)


def test_factor_stays_between_zero_and_one_for_every_size_of_run():
    sizes = itertools.product([1, 2, 7, 100, 101], [1, 3, 24, 500], [1, 2, 8], [1, 4], [0, 1])
    for num_samples, batch, world, epochs, ramp in sizes:
        total = num_samples * epochs
        warmup = warmup_length(total, epochs) if ramp else 0
        step = batch * world
        seen = range(0, total + 2 * step, step)  # padding may lead beyond the total
        factors = [learning_rate_factor(n, step, total, warmup=warmup) for n in seen]
        assert all(isinstance(factor, float) and 0 <= factor <= 1 for factor in factors)
        assert factors[0] > 0
        peak = factors.index(max(factors))
        assert factors[peak:] == sorted(factors[peak:], reverse=True)
        assert factors[:peak] == sorted(factors[:peak])


def test_impossible_counts_are_refused():
    for samples, batch, total, warmup in [(0, 1, 0, 0), (-1, 1, 9, 0), (0, 0, 9, 0), (0, 1, 9, -1)]:
        with pytest.raises(ValueError, match="learning rate needs"):
            learning_rate_factor(samples, batch, total, warmup=warmup)
