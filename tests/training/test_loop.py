"""The loop: it descends, it ends by its steps, it publishes what forecasts best, it says when it diverges."""

import json
import struct
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tensorboardX.proto import event_pb2

from training.loop import Diverged, Judgement, Schedule, Selection, fit
from training.recipe import Phase, SelectTable
from training.resume import Place


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

    def draw(self, rows):
        return (torch.ones(rows),)

    def loss(self, batch):
        self.calls += 1
        factor = torch.nan if self.calls == self._poison else 1.0
        return {"square": (batch[0] * (self.x - 3) ** 2).mean() * factor}

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
    (note,) = run.notes
    assert note.startswith("0.2 s were over at step")
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


def test_every_step_is_a_line_of_the_log(tmp_path):
    target = Parabola()
    fit(target, phase(steps=20, clip=0.5), lambda *_: None, Place(tmp_path, "network"))
    lines = [json.loads(line) for line in (tmp_path / "training.log").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[0]["loss"] == lines[0]["parts"]["square"] == 9.0
    assert lines[0]["gradient_norm"] == 6.0  # before it was clipped
    assert float(target.x.grad.abs()) <= 0.5
    assert lines[0]["learning_rate"] < lines[5]["learning_rate"] == 0.1
    assert all(line["rows_per_second"] > 0 and line["peak_memory_bytes"] > 1 << 20 for line in lines)


def test_the_average_of_the_weights_is_what_a_slow_loop_makes_of_them():
    path = []
    for steps in range(1, 11):
        target = Parabola()
        fit(target, phase(steps=steps, warmup=0, decay=1e-9), lambda *_: None)
        path.append(float(target.x.detach()))
    averaged = Parabola()
    fit(averaged, phase(steps=10, warmup=0, decay=1e-9, ema=0.5), lambda *_: None)
    expected = 0.0
    for step, x in enumerate(path, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * x
    assert float(averaged.x.detach()) == pytest.approx(expected, rel=1e-5)


def chosen(target, tmp_path, **table):
    """Published: what lies next to 1, although the loss is lowest at 3."""

    def judge():
        return Judgement(crps=abs(float(target.x.detach()) - 1), skill_vs_naive=0.0)

    selection = Selection(SelectTable(**{"every": 5, "stride": 1, **table}), judge)
    return fit(target, phase(steps=60, save_every=7), lambda *_: None, Place(tmp_path, "network"), selection)


def test_weights_are_chosen_by_their_forecasts_and_not_by_their_loss(tmp_path):
    target = Parabola()
    run = chosen(target, tmp_path, keep=2)
    lines = [json.loads(line) for line in (tmp_path / "training.log").read_text().splitlines()]
    judged = {line["step"]: line["crps"] for line in lines if "crps" in line}
    assert list(judged) == list(range(5, 61, 5))
    best = min(judged, key=judged.__getitem__)
    assert best < 60
    assert abs(float(target.x.detach()) - 1) == judged[best]
    assert run.steps == 60
    assert run.notes == (f"the weights of step {best} had the lowest CRPS on val, {judged[best]:.5f}",)
    assert len(list(tmp_path.glob("network-best-*"))) == 2


def test_a_run_without_a_better_forecast_ends_early_and_says_so(tmp_path):
    target = Parabola()
    run = chosen(target, tmp_path, patience=3)
    assert run.steps < 60
    assert run.notes[0].startswith("no better forecast since step")
    again = chosen(Parabola(), tmp_path, patience=3)  # gone on with, it is over
    assert (again.steps, again.loss, again.notes) == (run.steps, run.loss, run.notes)


def test_pieces_of_unequal_size_are_refused():
    with pytest.raises(ValidationError, match="do not make 5 equal pieces"):
        phase(batch_rows=32, accumulate=5)


def scalars(folder):
    """(tag, step, value) of every scalar in the one event file of a folder: records of length, CRC, data, CRC."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_tensorboard_shows_what_the_log_says_also_of_a_run_that_was_killed(tmp_path):
    place = Place(tmp_path, "network", tmp_path / "events")

    class Killed(BaseException): ...

    def stop(_, note):
        if note.startswith("step 12,"):
            raise Killed

    with pytest.raises(Killed):
        fit(Parabola(), phase(steps=20, save_every=5), stop, place)
    assert max(step for _, step, _ in scalars(tmp_path / "events")) == 12
    fit(Parabola(), phase(steps=20, save_every=5), lambda *_: None, place)
    lines = [json.loads(line) for line in (tmp_path / "training.log").read_text().splitlines()]
    shown = scalars(tmp_path / "events")
    for tag, name in (("network/loss", "loss"), ("network/learning_rate", "learning_rate")):
        steps = [(step, value) for found, step, value in shown if found == tag]
        assert steps == [(line["step"], pytest.approx(line[name])) for line in lines]
    assert {"network/loss/square", "network/gradient_norm", "network/rows_per_second"} < {tag for tag, *_ in shown}
