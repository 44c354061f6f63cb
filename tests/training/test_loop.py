"""The loop: it descends, it ends by its steps, it says when it diverges."""

import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from training.loop import Diverged, Schedule, fit
from training.recipe import Phase


class Parabola:
    """(x - 3)^2, and the shape of what the loop did to it."""

    def __init__(self, poison: int | None = None):
        self.x = torch.nn.Parameter(torch.zeros(1))
        self.network = torch.nn.ParameterDict({"x": self.x})
        self.rng = np.random.default_rng(0)
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


def test_rate_rises_stays_and_falls_by_the_step_alone():
    schedule = Schedule(phase(steps=100, learning_rate=2.0, warmup=0.1, decay=0.3, floor=0.25))
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([2 * (step + 1) / 11 for step in range(10)])
    assert set(rates[10:71]) == {2.0}
    assert rates[85] == pytest.approx(0.5 + 1.5 / 2)
    assert rates[100] == pytest.approx(0.5)
    assert rates[70:] == sorted(rates[70:], reverse=True)


def test_a_slow_machine_takes_the_steps_of_a_fast_one():
    runs = []
    for pause in (0.0, 0.01):
        target = Parabola()
        fit(target, phase(steps=20), lambda done, note, pause=pause: time.sleep(pause))
        runs.append(float(target.x.detach()))
    assert runs[0] == runs[1]


def test_warm_up_and_decay_longer_than_the_phase_are_refused():
    with pytest.raises(ValidationError, match="more than the whole phase"):
        phase(warmup=0.5, decay=0.6)


def test_the_guard_winds_down_within_a_tenth_and_says_so():
    run = fit(Parabola(), phase(steps=10**9, max_seconds=0.2), lambda done, note: None)
    assert 0 < run.steps < 10**9
    assert run.note is not None
    assert run.note.startswith("0.2 s were over at step")
    schedule = Schedule(phase(steps=1000, max_seconds=1.0, learning_rate=1.0))
    before = [schedule.rate(step) for step in range(500)]
    schedule.wind_down(500)
    schedule.wind_down(510)  # time stays up
    assert [schedule.rate(step) for step in range(500)] == before
    assert schedule.steps == 551
    assert 0 < schedule.rate(550) < 0.01 < schedule.rate(501) < schedule.rate(500) == 1.0


def test_the_guard_leaves_a_run_alone_that_is_nearly_done():
    schedule = Schedule(phase(steps=1000))
    schedule.wind_down(990)
    assert (schedule.steps, schedule.note) == (1000, None)


def test_not_a_number_ends_the_run_with_the_step():
    with pytest.raises(Diverged, match="step 4"):
        fit(Parabola(poison=5), phase(), lambda done, note: None)
