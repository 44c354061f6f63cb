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


Report = Callable[[float, str], None]  # share done, one line


def fit(objective: Objective, phase: Phase, report: Report) -> Run:
    """Minimise `objective` for `phase.steps` steps or `phase.max_seconds`, whichever ends first.

    The rate follows whichever of the two is further along, so that a slow machine anneals as well.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=phase.learning_rate, betas=phase.betas, weight_decay=phase.weight_decay
    )
    losses: list[float] = []
    started = time.monotonic()
    for step in range(phase.steps):
        done = max(step / phase.steps, (time.monotonic() - started) / phase.max_seconds)
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = phase.learning_rate * _rate(done, phase.warmup)
        optimiser.zero_grad()
        loss = objective.loss(phase.batch_rows)
        if not math.isfinite(value := loss.item()):
            raise Diverged(f"the loss is {value} at step {step}: lower the learning rate or the clipping norm")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, phase.clip)
        optimiser.step()
        objective.after_step()
        losses.append(value)
        report(done, f"step {step + 1}, loss {_tail_mean(losses):.4f}")
    report(1.0, f"{len(losses)} steps, loss {_tail_mean(losses):.4f}")
    return Run(len(losses), time.monotonic() - started, _tail_mean(losses))


def _rate(done: float, warmup: float) -> float:
    """Share of the peak rate when `done` of the phase has passed."""
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _tail_mean(losses: list[float]) -> float:
    tail = losses[-max(10, len(losses) // 10) :]
    return sum(tail) / len(tail)
