"""The training loop, visible as one loop."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import ran_out_of_memory
from training import processes
from training.recipe import Phase, SelectTable
from training.resume import Log, Place, read_state, write_state

_MAXRSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024  # bytes


class Diverged(RuntimeError):
    """The loss or its gradient is no longer a number."""


class OutOfMemory(RuntimeError):
    """A batch does not fit."""


Batch = tuple[Tensor, ...]
LossOf = Callable[[Batch], Mapping[str, Tensor]]
Report = Callable[[float, str], None]  # share done, one line


class Judgement(NamedTuple):
    """Forecasts of the val part; the lower CRPS is the better one."""

    crps: float
    skill_vs_naive: float


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

    def draw(self, rows: int) -> Batch:
        """Fresh windows: tensors with `rows` along the first axis."""
        ...

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """Parts whose sum is the loss, each a mean over the rows of the batch."""
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
    notes: tuple[str, ...] = ()  # why it ended before its time, which weights it chose


@dataclass(frozen=True)
class Selection:
    """How the published weights are chosen."""

    table: SelectTable
    judge: Callable[[], Judgement]  # of the weights that the network has at this time


def fit(
    objective: Objective,
    phase: Phase,
    report: Report,
    place: Place | None = None,
    selection: Selection | None = None,
) -> Run:
    """Minimise `objective` for `phase.steps` steps; the learning rate is a function of the step alone.

    After `phase.max_seconds` the rate falls to its floor within a tenth of the steps taken so far, and the run ends.
    State and training.log are kept at `place`; a state that is there already is gone on from, to the very weights of a
    run that was never killed. With a `selection`, which needs a place, the network ends with the best weights judged.
    Diverged and OutOfMemory say which state is the last good one. Where there are several processes, all of them
    call this; each takes its share of every batch, and all end with the same weights.
    """
    fitting = Fitting(objective, phase)
    if place and place.state.exists():
        fitting.restore(*read_state(place.state))
    losses = fitting.losses
    with place.log(len(losses)) if place and processes.rank() == 0 else nullcontext() as log:
        _descend(fitting, phase, report, log, place, selection)
    notes = tuple(note for note in (fitting.schedule.note, fitting.finish(place)) if note)
    processes.wait()  # or the first would be gone, and its files, before the last has read them
    report(1.0, f"{len(losses)} steps, loss {_tail_mean(losses):.4f}")
    return Run(len(losses), fitting.seconds(), _tail_mean(losses), notes)


def _descend(
    fitting: "Fitting",
    phase: Phase,
    report: Report,
    log: Log | None,
    place: Place | None,
    selection: Selection | None,
) -> None:
    """Take the steps that are left."""
    schedule, losses = fitting.schedule, fitting.losses
    while (step := len(losses)) < schedule.steps:
        if phase.max_seconds and processes.agreed(fitting.seconds())[0] > phase.max_seconds:
            schedule.wind_down(step)
        try:
            facts = fitting.update(schedule.rate(step))
        except (RuntimeError, MemoryError) as error:
            raise _explained(error, phase, step, place) from error
        if place and selection and _due(len(losses), selection.table.every, schedule):
            facts |= fitting.judge(place, selection)._asdict()
        if log:
            log.write(facts)
        if place and processes.rank() == 0 and _due(len(losses), phase.save_every, schedule):
            write_state(place.state, fitting.tensors(), fitting.facts())
            if selection:
                place.keep_best(fitting.best(selection.table.keep))
        report(len(losses) / schedule.steps, f"step {len(losses)}, loss {_tail_mean(losses):.4f}")


def _peak_bytes(device: torch.device) -> int:
    """Of the GPU's memory, or of this process'."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def _due(step: int, every: int, schedule: "Schedule") -> bool:
    return step % every == 0 or step == schedule.steps


def _explained(error: Exception, phase: Phase, step: int, place: Place | None) -> Exception:
    kept = f"; the last good state is kept in {place.state}" if place and place.state.exists() else ""
    if isinstance(error, Diverged):
        return Diverged(f"{error} at step {step}: lower the learning rate or the clipping norm{kept}")
    if ran_out_of_memory(error):
        rows = f"batch_rows = {phase.batch_rows} and accumulate = {phase.accumulate}"
        mend = "raise the latter, lower the former" + ("" if phase.checkpoint else " or set checkpoint = true")
        return OutOfMemory(f"out of memory at step {step} with {rows}: {mend}{kept}")
    return error


class Fitting:
    """Everything that the next step depends on."""

    def __init__(self, objective: Objective, phase: Phase) -> None:
        self.losses: list[float] = []
        self.schedule = Schedule(phase)
        self._objective, self._phase = objective, phase
        self._device = next(iter(objective.parameters())).device
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(
            self._parameters, lr=phase.learning_rate, betas=phase.betas, weight_decay=phase.weight_decay, fused=True
        )
        self._loss: LossOf = torch.compile(objective.loss, dynamic=False) if phase.compile else objective.loss
        if phase.checkpoint:
            self._loss = _run_again(objective.network, self._loss)
        if phase.batch_rows % (phase.accumulate * processes.count()):
            raise ValueError(f"{phase.batch_rows} rows do not make equal pieces for {processes.count()} processes")
        self._average = [p.detach().clone() for p in self._parameters] if phase.ema else []
        self._judged: list[tuple[Judgement, int]] = []
        self._started = time.monotonic()

    def seconds(self) -> float:
        """How long the phase has run, what came before a kill included."""
        return time.monotonic() - self._started

    def update(self, rate: float) -> dict[str, Any]:
        """One step, and what there is to log of it. No weight has changed where it raises Diverged."""
        started = time.monotonic()
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad()
        parts = self._gradients()
        if not math.isfinite(loss := sum(parts.values())):
            raise Diverged(f"the loss is {loss}")
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not math.isfinite(norm):
            raise Diverged(f"the loss is {loss}, but its gradient's norm is {float(norm)}")
        if norm > self._phase.clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self._phase.clip, norm)
        self._optimiser.step()
        self._objective.after_step()
        self._follow()
        self.losses.append(loss)
        return {
            "step": len(self.losses),
            "loss": loss,
            "parts": parts,
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "rows_per_second": self._phase.batch_rows / (time.monotonic() - started),
            "peak_memory_bytes": _peak_bytes(self._device),
        }

    def _gradients(self) -> dict[str, float]:
        """Leave the gradients of one batch, taken piece by piece, with the parameters; its mean loss by part.

        Every process draws the whole batch, so that all generators stay where they would be with one.
        """
        batch = [tensor.to(self._device) for tensor in self._objective.draw(self._phase.batch_rows)]
        several = self._phase.accumulate * processes.count()
        pieces = list(zip(*(tensor.chunk(several) for tensor in batch), strict=True))
        names: tuple[str, ...] = ()
        means = []
        for piece in pieces[processes.rank() :: processes.count()]:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._phase.precision == "bfloat16"):
                parts = self._loss(piece)
            names, found = tuple(parts), torch.stack(list(parts.values()))
            (found.sum() / several).backward()
            means.append(found.detach())
        shares = torch.stack(means).sum(0, dtype=torch.float64) / several
        processes.add_up([shares])
        processes.add_up([p.grad for p in self._parameters if p.grad is not None])
        return dict(zip(names, shares.tolist(), strict=True))

    def _follow(self) -> None:
        """Move the average towards the weights, faster while it is young."""
        if self._phase.ema:
            step = len(self.losses) + 1
            decay = min(self._phase.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    def judge(self, place: Place, selection: Selection) -> Judgement:
        """Judge the weights as they would be published, keep them if they are among the best, end what is stale."""
        step, table = len(self.losses), selection.table
        with self._averaged():
            own = selection.judge() if processes.rank() == 0 else Judgement(0, 0)
            judgement = Judgement(*processes.agreed(*own))
            self._judged.append((judgement, step))
            best = self.best(table.keep)
            if step in best and processes.rank() == 0:
                write_state(place.best(step), self._objective.network.state_dict(), {})
        processes.wait()
        stale = sum(at > best[0] for _, at in self._judged)
        if stale >= (table.patience or math.inf) and step < self.schedule.steps:
            self.schedule.stop(step, f"no better forecast since step {best[0]}")
        return judgement

    def best(self, count: int) -> list[int]:
        """The steps after which the weights forecast best, at most `count`, the very best first."""
        return [step for _, step in sorted(self._judged)[:count]]

    def finish(self, place: Place | None) -> str | None:
        """Leave with the network the weights to publish; which ones, if there was a choice."""
        if place and self._judged:
            judgement, step = min(self._judged)
            self._objective.network.load_state_dict(read_state(place.best(step))[0])
            return f"the weights of step {step} had the lowest CRPS on val, {judgement.crps:.5f}"
        self._swap()
        return None

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the weights and their average, if there is one."""
        for parameter, average in zip(self._parameters, self._average, strict=False):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments of the optimiser, losses so far, torch's generator."""
        moments = self._optimiser.state_dict()["state"]
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "torch_rng": torch.get_rng_state(),
            **{f"weights/{name}": tensor for name, tensor in self._objective.network.state_dict().items()},
            **{f"average/{index}": tensor for index, tensor in enumerate(self._average)},
            **{f"moments/{index}/{name}": value for index, of in moments.items() for name, value in of.items()},
        }

    def facts(self) -> dict[str, Any]:
        """The rest, as JSON has it."""
        rng = self._objective.rng.bit_generator.state
        judged = [[*judgement, step] for judgement, step in self._judged]
        return {
            "seconds": self.seconds(),
            "schedule": self.schedule.facts(),
            "rng": rng,
            "judged": judged,
        }

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
        for index, tensor in _under("average/", tensors).items():
            self._average[int(index)].copy_(tensor)
        self.schedule.restore(facts["schedule"])
        self._judged = [(Judgement(crps, skill), step) for crps, skill, step in facts["judged"]]
        self._started -= facts["seconds"]
        self._objective.rng.bit_generator.state = facts["rng"]
        torch.set_rng_state(tensors["torch_rng"])


def _run_again(network: nn.Module, loss: LossOf) -> LossOf:
    """`loss`, for which the layers of stacks keep their input alone, and run again in the backward pass.

    Chen et al. 2016, arXiv 1604.06174. The network knows of it only as long as the loss is being computed.
    """
    stacks = [stack for stack in network.modules() if isinstance(stack, nn.ModuleList)]
    again = {layer: partial(checkpoint, layer.forward, use_reentrant=False) for stack in stacks for layer in stack}

    def run(batch: Batch) -> Mapping[str, Tensor]:
        for layer, forward in again.items():
            layer.forward = forward
        try:
            return loss(batch)
        finally:
            for layer in again:
                del layer.forward  # what its class has is there again

    return run


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Schedule:
    """Learning rates by step: a linear rise, a plateau, a cosine down to the floor."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self.cut: int | None = None  # the step at which time was up
        self.steps = phase.steps
        self.note: str | None = None  # why there are fewer steps than the recipe has

    def facts(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"cut": self.cut, "steps": self.steps, "note": self.note}

    def restore(self, facts: Mapping[str, Any]) -> None:
        self.cut, self.steps, self.note = facts["cut"], facts["steps"], facts["note"]

    def stop(self, step: int, why: str) -> None:
        """End the phase after `step` steps."""
        self.steps, self.note = step, f"{why}: it ended after {step} of {self._phase.steps} steps"

    def wind_down(self, step: int) -> None:
        """Let the rate fall from here on, unless it is about to anyway."""
        ends = step + 1 + step // 10
        if self.cut is None and ends < self.steps:
            self.cut = step
            self.stop(ends, f"{self._phase.max_seconds or 0:g} s were over at step {step}")

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
