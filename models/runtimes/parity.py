"""How far a runtime is from the eager float32 functions, function by function, on the same inputs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
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

    `equal_tokens`: the share of integer results that agree. What follows another token is another number: a call
    that drew one is not part of `errors`.
    """

    errors: dict[str, float]
    equal_tokens: float | None  # None: the functions draw none


def record(forecaster: Forecaster, inputs: Sequence[ForecastInput]) -> list[Call]:
    """Every call that one batch of `inputs` makes; arguments are copied, for callers may reuse their memory."""
    assert isinstance(forecaster, Executable)
    calls: list[Call] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            kept = _pytree.tree_map(torch.clone, arguments)
            result = function(*arguments)
            calls.append(Call(name, kept, flattened(result)))
            return result

        return call

    spied = forecaster.executed_by({name: recorded(name, f) for name, f in forecaster.functions.items()})
    spied.run(spied.prepare(inputs))
    return calls


@torch.inference_mode()
def compare(calls: Sequence[Call], functions: Functions, examples: Mapping[str, Sequence[Any]]) -> FunctionParity:
    """Repeat `calls` with `functions`: every one starts from the same numbers, so errors do not add up.

    `examples` are arguments of the functions, whose dtypes those of the calls are cast to.
    """
    errors: dict[str, float] = defaultdict(float)
    equal, drawn = 0, 0
    for call in calls:
        arguments = _pytree.tree_map(lambda a, like: a.to(like.dtype), list(call.arguments), list(examples[call.name]))
        pairs = list(zip(call.result, flattened(functions[call.name](*arguments)), strict=True))
        tokens = [(a, b) for a, b in pairs if a.dtype == torch.int64]
        agreed = sum(int((a == b).sum()) for a, b in tokens)
        asked = sum(a.numel() for a, _ in tokens)
        equal, drawn = equal + agreed, drawn + asked
        if agreed == asked:
            found = max((_error(a, b) for a, b in pairs if a.dtype != torch.int64), default=0.0)
            errors[call.name] = max(errors[call.name], found)
    return FunctionParity(dict(errors), equal / drawn if drawn else None)


def _error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference over largest magnitude; infinite where one is finite and the other is not."""
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    expected, found = expected[finite].double(), found[finite].double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
