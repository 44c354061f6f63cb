"""How far a runtime is from the eager float32 functions, function by function, on the same inputs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from models.forecaster import Forecaster, ForecastInput
from models.runtimes.functions import Executable, Functions, flattened


@dataclass(frozen=True)
class Call:
    """One call of a function, as it was made."""

    name: str
    arguments: tuple[Any, ...]
    result: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class FunctionParity:
    """`errors`: of each function, the largest difference of a result over that result's largest magnitude.

    `equal_tokens`: the share of integer results that agree.
    """

    errors: dict[str, float]
    equal_tokens: float


def record(forecaster: Forecaster, inputs: Sequence[ForecastInput]) -> list[Call]:
    """Every call that one batch of `inputs` makes; arguments are copied, for callers may reuse their memory."""
    assert isinstance(forecaster, Executable)
    calls: list[Call] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            kept = _pytree.tree_map(torch.clone, arguments)
            result = function(*arguments)
            calls.append(Call(name, kept, tuple(result)))
            return result

        return call

    spied = forecaster.executed_by({name: recorded(name, f) for name, f in forecaster.functions.items()})
    spied.run(spied.prepare(inputs))
    return calls


@torch.inference_mode()
def compare(calls: Sequence[Call], functions: Functions) -> FunctionParity:
    """Repeat `calls` with `functions`: every one starts from the same numbers, so errors do not add up."""
    errors: dict[str, float] = defaultdict(float)
    equal, integers = 0, 0
    for call in calls:
        for expected, found in zip(call.result, flattened(functions[call.name](*call.arguments)), strict=True):
            if not expected.is_floating_point():
                equal, integers = equal + int((expected == found).sum()), integers + expected.numel()
                continue
            finite = torch.isfinite(expected)
            difference = (found.double() - expected.double())[finite].abs().max()
            size = expected[finite].double().abs().max().clamp_min(1e-12)
            error = float(difference / size) if torch.equal(finite, torch.isfinite(found)) else float("inf")
            errors[call.name] = max(errors[call.name], error)
    return FunctionParity(dict(errors), equal / integers if integers else 1.0)
