"""The training loop, visible as one loop."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from training.recipe import Phase
from training.resume import Place, read_state, write_state

_NO_MEMORY: Final = "can't allocate memory"  # torch says so on a CPU, in a RuntimeError like any other


class Diverged(RuntimeError):
    """The loss or its gradient is no longer a number."""


class OutOfMemory(RuntimeError):
    """A batch does not fit."""


class Objective(Protocol):
    """What is minimised."""

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def rng(self) -> np.random.Generator:
        """What decides which windows are drawn."""
        ...

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


def fit(objective: Objective, phase: Phase, report: Report, place: Place | None = None) -> Run:
    """Minimise `objective` for `phase.steps` steps; the learning rate is a function of the step alone.

    After `phase.max_seconds` the rate falls to its floor within a tenth of the steps taken so far, and the run ends.
    The state is kept at `place`; one that is there already is gone on from, to the very weights of a run that was
    never killed. Diverged and OutOfMemory say which state is the last good one.
    """
    fitting = _Fitting(objective, phase)
    if place and place.state.exists():
        fitting.restore(*read_state(place.state))
    schedule, losses = fitting.schedule, fitting.losses
    while (step := len(losses)) < schedule.steps:
        if phase.max_seconds and fitting.seconds() > phase.max_seconds:
            schedule.wind_down(step)
        try:
            fitting.update(schedule.rate(step))
        except (RuntimeError, MemoryError) as error:
            raise _explained(error, phase, step, place) from error
        if place and (len(losses) % phase.save_every == 0 or len(losses) == schedule.steps):
            write_state(place.state, fitting.tensors(), fitting.facts())
        report(len(losses) / schedule.steps, f"step {len(losses)}, loss {_tail_mean(losses):.4f}")
    report(1.0, f"{len(losses)} steps, loss {_tail_mean(losses):.4f}")
    return Run(len(losses), fitting.seconds(), _tail_mean(losses), schedule.note)


def _explained(error: Exception, phase: Phase, step: int, place: Place | None) -> Exception:
    kept = f"; the last good state is kept in {place.state}" if place and place.state.exists() else ""
    if isinstance(error, Diverged):
        return Diverged(f"{error} at step {step}: lower the learning rate or the clipping norm{kept}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error):
        return OutOfMemory(f"out of memory at step {step}: batch_rows = {phase.batch_rows} is too much{kept}")
    return error


class _Fitting:
    """Everything that the next step depends on."""

    def __init__(self, objective: Objective, phase: Phase) -> None:
        self.losses: list[float] = []
        self.schedule = Schedule(phase)
        self._objective, self._phase = objective, phase
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(
            self._parameters, lr=phase.learning_rate, betas=phase.betas, weight_decay=phase.weight_decay
        )
        self._started = time.monotonic()

    def seconds(self) -> float:
        """How long the phase has run, what came before a kill included."""
        return time.monotonic() - self._started

    def update(self, rate: float) -> None:
        """One step. Nothing has changed where it raises Diverged."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad()
        loss = self._objective.loss(self._phase.batch_rows)
        if not math.isfinite(value := loss.item()):
            raise Diverged(f"the loss is {value}")
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._phase.clip))
        if not math.isfinite(norm):
            raise Diverged(f"the loss is {value}, but its gradient's norm is {norm}")
        self._optimiser.step()
        self._objective.after_step()
        self.losses.append(value)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments of the optimiser, losses so far, torch's generator."""
        moments = self._optimiser.state_dict()["state"]
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "torch_rng": torch.get_rng_state(),
            **{f"weights/{name}": tensor for name, tensor in self._objective.network.state_dict().items()},
            **{f"moments/{index}/{name}": value for index, of in moments.items() for name, value in of.items()},
        }

    def facts(self) -> dict[str, Any]:
        """The rest, as JSON has it."""
        rng = self._objective.rng.bit_generator.state
        return {"seconds": self.seconds(), "cut": self.schedule.cut, "rng": rng}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Stand where `tensors` and `facts` were taken."""
        self.losses[:] = tensors["losses"].tolist()
        self._objective.network.load_state_dict(_under("weights/", tensors))
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in _under("moments/", tensors).items():
            index, _, key = name.partition("/")
            moments[int(index)][key] = value
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})
        if facts["cut"] is not None:
            self.schedule.wind_down(facts["cut"])
        self._started -= facts["seconds"]
        self._objective.rng.bit_generator.state = facts["rng"]
        torch.set_rng_state(tensors["torch_rng"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
