"""Averaged weights: by hand, in use only within their context, refused for another model."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.toy import Slices, Toy, one_group, train, training_loader
from usam.training.checkpoint import Progress
from usam.training.ema import WeightAverage
from usam.weights.inference import averaged


def test_the_average_by_hand() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 8.0)
    average = WeightAverage(model, 0.25)
    torch.nn.init.constant_(model.weight, 0.0)
    average.update()  # (1 + 1) / (10 + 1) of the old
    assert average.weights["weight"].item() == pytest.approx(8 * 2 / 11)
    average.update()  # 3 / 12
    average.update()  # 4 / 13 is more than 0.25
    assert average.weights["weight"].item() == pytest.approx(8 * 2 / 11 * 0.25 * 0.25)


def test_the_average_is_in_use_only_within_its_context() -> None:
    model = Toy()
    average = WeightAverage(model, 0.9)
    train(model, training_loader(Slices(12), 2), one_group(model), progress=Progress(),
          average=average)  # fmt: skip
    last = {name: value.clone() for name, value in model.state_dict().items()}
    held = {name: value.clone() for name, value in average.weights.items()}
    assert average.num_updates == 6
    assert not torch.equal(last["inner.weight"], held["inner.weight"])
    with average.in_use():
        assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, held[name]) for name, value in average.weights.items())


def test_no_decay_is_no_average() -> None:
    model = Toy()
    average = WeightAverage(model, 0.0)
    average.update()
    with average.in_use():
        assert average.weights == {}
    assert averaged({"model": {"a": 1}, "best": 2}) == {"model": {"a": 1}, "best": 2}


def test_the_average_of_another_model_is_refused() -> None:
    saved = WeightAverage(Toy(num_classes=4), 0.9).state_dict()
    with pytest.raises(ValueError, match="of another model"):
        WeightAverage(Toy(), 0.9).load_state_dict(saved)
