"""The loop: it descends, it stops in time, it says when it diverges."""

import pytest
import torch

from training.loop import Diverged, fit
from training.recipe import Phase


class Parabola:
    """(x - 3)^2, and the shape of what the loop did to it."""

    def __init__(self, poison: int | None = None):
        self.x = torch.nn.Parameter(torch.zeros(1))
        self.calls = 0
        self.restored = 0
        self._poison = poison

    def parameters(self):
        return [self.x]

    def loss(self, rows):
        assert rows == 32
        self.calls += 1
        factor = torch.nan if self.calls == self._poison else 1.0
        return ((self.x - 3) ** 2).sum() * factor

    def after_step(self):
        self.restored += 1


def phase(**fields):
    return Phase(**{"steps": 300, "max_seconds": 60, "learning_rate": 0.1, "weight_decay": 0.0, **fields})


def test_loss_descends_and_every_step_is_reported():
    target, seen = Parabola(), []
    run = fit(target, phase(), lambda done, note: seen.append((done, note)))
    assert abs(float(target.x.detach()) - 3) < 0.05
    assert run.steps == target.calls == target.restored == 300
    assert len(seen) == 301
    assert seen[-1][0] == 1.0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_phase_ends_when_its_seconds_are_over():
    run = fit(Parabola(), phase(steps=10**9, max_seconds=0.2), lambda done, note: None)
    assert 0 < run.steps < 10**9


def test_not_a_number_ends_the_run_with_the_step():
    with pytest.raises(Diverged, match="step 4"):
        fit(Parabola(poison=5), phase(), lambda done, note: None)
