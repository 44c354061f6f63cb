"""The training loop, visible as one loop."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from training.recipe import Phase


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class Objective(Protocol):
    """What is minimised."""

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def loss(self, rows: int) -> Tensor:
        """The loss of `rows` freshly drawn windows."""
        ...

    def after_step(self) -> None:
        """Restore what the optimiser may not move."""
        ...


@dataclass(frozen=True)
class Run:
    """What a phase did."""

    steps: int
    seconds: float
    loss: float  # mean of the last tenth
    note: str | None = None  # why it ended before its time


Report = Callable[[float, str], None]  # share done, one line


def fit(objective: Objective, phase: Phase, report: Report) -> Run:
    """Minimise `objective` for `phase.steps` steps; the learning rate is a function of the step alone.

    After `phase.max_seconds` the rate falls to its floor within a tenth of the steps taken so far, and the run ends.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=phase.learning_rate, betas=phase.betas, weight_decay=phase.weight_decay
    )
    losses: list[float] = []
    schedule = Schedule(phase)
    started = time.monotonic()
    while (step := len(losses)) < schedule.steps:
        if phase.max_seconds and time.monotonic() - started > phase.max_seconds:
            schedule.wind_down(step)
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        optimiser.zero_grad()
        loss = objective.loss(phase.batch_rows)
        if not math.isfinite(value := loss.item()):
            raise Diverged(f"the loss is {value} at step {step}: lower the learning rate or the clipping norm")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, phase.clip)
        optimiser.step()
        objective.after_step()
        losses.append(value)
        report(len(losses) / schedule.steps, f"step {len(losses)}, loss {_tail_mean(losses):.4f}")
    report(1.0, f"{len(losses)} steps, loss {_tail_mean(losses):.4f}")
    return Run(len(losses), time.monotonic() - started, _tail_mean(losses), schedule.note)


class Schedule:
    """Learning rates by step: a linear rise, a plateau, a cosine down to the floor."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self.cut: int | None = None  # the step at which time was up
        self.steps = phase.steps

    @property
    def note(self) -> str | None:
        """Why there are fewer steps than the recipe has."""
        if self.cut is None:
            return None
        phase = self._phase
        return f"{phase.max_seconds:g} s were over at step {self.cut}: it ended after {self.steps} of {phase.steps}"

    def wind_down(self, step: int) -> None:
        """Let the rate fall from here on, unless it is about to anyway."""
        ends = step + 1 + step // 10
        if self.cut is None and ends < self.steps:
            self.cut, self.steps = step, ends

    def rate(self, step: int) -> float:
        """The rate of one step, counted from 0."""
        if self.cut is None or step < self.cut:
            return self._phase.learning_rate * self._planned(step)
        start = self._planned(self.cut)
        left = _cosine((step - self.cut) / (self.steps - self.cut))
        return self._phase.learning_rate * (self._phase.floor + left * max(0.0, start - self._phase.floor))

    def _planned(self, step: int) -> float:
        phase = self._phase
        if step < (rising := phase.warmup * phase.steps):
            return (step + 1) / (rising + 1)
        falling = phase.decay * phase.steps
        left = _cosine(max(0.0, step - (phase.steps - falling)) / falling)
        return phase.floor + left * (1 - phase.floor)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _tail_mean(losses: list[float]) -> float:
    tail = losses[-max(10, len(losses) // 10) :]
    return sum(tail) / len(tail)
