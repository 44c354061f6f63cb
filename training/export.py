"""One runtime of a stored version: built, compared with float32 run eagerly, and stored only if it agrees."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import numpy as np
import torch

from model_store.artefacts import find_artefacts, put_artefact
from model_store.manifest import Artefact, Parity
from model_store.store import ModelStore
from models.candles import CLOSE, Floats
from models.forecaster import Forecaster, ForecastInput, forecast, served_sampling
from models.probes import usual_size
from models.runtimes.functions import Executable
from models.runtimes.kinds import FP32_EAGER, Kind, platform_name
from models.runtimes.parity import Call, FunctionParity, compare, record
from models.uniforms import derive_seed
from training.candle_files import Series
from training.windows import forecast_input, series_calendar

LEVELS: Final = (0.1, 0.5, 0.9)
_RECENT: Final = 0.4  # calibration windows end in this newest share of each series
_RECORDED: Final = 3  # requests whose calls are compared one by one
_STEPS: Final = 4
_PATHS: Final = 4
_BATCH_ROWS: Final = 16
# float32 runtimes differ by the order of their sums alone. Tokens differ where a uniform lies within such an error
# of a boundary. Reduced precision is judged by what it does to forecasts: one other token and a path goes elsewhere,
# so drawn quantiles may move as far as another seed moves them (measured with some noise), but nowhere in particular.
# Its functions err by 0.01 at most; five times as much is no rounding but a fault that forecasts may hide.
_REDUCED: Final = {
    "functions": 0.05,
    "unequal_tokens": 0.1,
    "mae_change": 0.01,
    "quantile_bias": 0.02,
    "quantile_shift": 0.05,
    "quantile_shift_over_seed": 1.25,
}
BUDGETS: Final = {
    "float32": {"functions": 1e-5, "unequal_tokens": 1e-3},
    "bfloat16": _REDUCED,
    "int8": _REDUCED,
}


class ExportRefused(RuntimeError):
    """The runtime does not agree with float32 run eagerly; nothing was stored."""


@dataclass(frozen=True)
class Calibration:
    """Real requests, and the log-returns since their last close that followed, `[N, H]`."""

    inputs: Sequence[ForecastInput]
    actual: Floats


def calibration(
    forecaster: Forecaster, serving: dict[str, object], series: Sequence[Series], count: int
) -> Calibration:
    """About `count` requests of the usual size with the version's own sampling, over the newest candles of `series`.

    ValueError if no series is long enough.
    """
    limits = forecaster.limits
    lookback, horizon = usual_size(forecaster)
    sampling = served_sampling(serving)
    inputs, actual = [], []
    for item in series:
        last = len(item) - horizon - 1
        first = max(int(len(item) * (1 - _RECENT)), min(lookback, len(item) // 2))
        if last < first or first + 1 < limits.min_context:
            continue
        calendar = series_calendar(item)
        for origin in np.unique(np.linspace(first, last, max(1, count // len(series))).astype(int)).tolist():
            plain = forecast_input(item, origin, horizon=horizon, lookback=lookback, calendar=calendar)
            seed = derive_seed(item.symbol, item.interval, int(item.timestamps[origin]))
            inputs.append(replace(plain, levels=LEVELS, sampling=sampling, seed=seed))
            actual.append(np.log(item.candles[origin + 1 : origin + 1 + horizon, CLOSE] / plain.last_close))
    if not inputs:
        raise ValueError(f"no series has {horizon} candles after a context to calibrate with")
    return Calibration(inputs, np.stack(actual))


def export(
    store: ModelStore, reference: str, kind: Kind, series: Sequence[Series], *, key: bytes, device: str, windows: int
) -> Artefact:
    """Build `kind` of a version, judge it, store it; one that is there already is returned as it is.

    ExportRefused says which number missed which budget.
    """
    if kind.label == FP32_EAGER or kind.runtime == "cuda_graph":
        raise ValueError(f"{kind.label} needs no export: it runs what the version and its artefacts have")
    place = platform_name(torch.device(device))
    known = find_artefacts(store, reference, platform=place, torch_version=torch.__version__)
    if kind.label in known and (not kind.native or known[kind.label].is_signed_by(key)):
        return known[kind.label]
    version = store.load(reference)
    forecaster = version.build(device)
    if not isinstance(forecaster, Executable):
        raise ValueError(f"{reference} has no network to export")
    started = time.monotonic()
    files = kind.build(forecaster.decoder)
    built = time.monotonic() - started
    functions = kind.load(forecaster.decoder, files, torch.get_num_threads())
    asked = calibration(forecaster, version.manifest.serving, series, windows)
    parity = _judged(
        kind,
        compare(_calls(forecaster, asked.inputs), functions, kind.served(forecaster.decoder).examples(0)),
        forecaster,
        forecaster.executed_by(functions, fours=kind.fours),
        asked,
    )
    artefact = Artefact(
        model=version.manifest.model,
        version=version.manifest.version,
        runtime=kind.runtime,
        dtype=kind.dtype,
        platform=place,
        torch=torch.__version__,
        files={},
        parity=parity,
        build_seconds=round(built, 3),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return put_artefact(store, artefact, files, key)


def _calls(forecaster: Forecaster, inputs: Sequence[ForecastInput]) -> list[Call]:
    """Calls of every function: of a few short requests, and of one beyond the usual horizon if that needs others."""
    assert isinstance(forecaster, Executable)
    alike = [item for item in inputs if forecaster.bucket(item) == forecaster.bucket(inputs[0])]
    calls = record(forecaster, [_with_steps(item, _STEPS) for item in alike[:_RECORDED]])
    if set(forecaster.functions) - {call.name for call in calls}:
        calls += record(forecaster, [_with_steps(inputs[0], inputs[0].horizon + 1)])
    if unseen := set(forecaster.functions) - {call.name for call in calls}:
        raise ExportRefused(f"no request calls {', '.join(sorted(unseen))}: there is nothing to judge it by")
    return calls


def _with_steps(item: ForecastInput, steps: int) -> ForecastInput:
    """A few paths of `steps` steps: enough to compare functions by."""
    known = len(item.timestamps)
    ahead = (item.timestamps[-1] - item.timestamps[-2]) * np.arange(1, steps + 1)
    return replace(
        item,
        future_timestamps=item.timestamps[-1] + ahead,
        local_times=np.concatenate([item.local_times[:known], item.local_times[known - 1] + ahead]),
        sampling=replace(item.sampling, samples=_PATHS),
    )


def _judged(
    kind: Kind, functions: FunctionParity, reference: Forecaster, candidate: Forecaster, asked: Calibration
) -> Parity:
    budget = BUDGETS[kind.dtype]
    parity = Parity(functions=functions.errors, equal_tokens=functions.equal_tokens, budget=budget)
    unequal = 0.0 if functions.equal_tokens is None else 1 - functions.equal_tokens
    _refuse_above(kind, "the share of unequal tokens", unequal, budget["unequal_tokens"])
    _refuse_above(kind, "the largest error of a function", max(functions.errors.values()), budget["functions"])
    if kind.dtype == "float32":
        return parity
    expected, found = (_closes(forecaster, asked.inputs) for forecaster in (reference, candidate))
    errors = [float(np.abs(values[:, LEVELS.index(0.5)] - asked.actual).mean()) for values in (found, expected)]
    moved = _moved(expected, found)
    of_a_seed = {}
    if functions.equal_tokens is not None:
        reseeded = _closes(reference, [replace(item, seed=item.seed ^ 1) for item in asked.inputs])
        of_a_seed = {level: float(np.abs(by).mean()) for level, by in _moved(expected, reseeded).items()}
    parity = parity.model_copy(
        update={
            "windows": len(asked.inputs),
            "mae_log_return": errors[0],
            "mae_log_return_float32": errors[1],
            "quantile_bias": {level: float(by.mean()) for level, by in moved.items()},
            "quantile_shift": {level: float(np.abs(by).mean()) for level, by in moved.items()},
            "quantile_shift_of_a_seed": of_a_seed,
        }
    )
    _refuse_above(kind, "the change of the forecasts' MAE", abs(errors[0] / errors[1] - 1), budget["mae_change"])
    for level, bias in parity.quantile_bias.items():
        _refuse_above(kind, f"the bias of the {level} quantile", abs(bias), budget["quantile_bias"])
        allowed = max(budget["quantile_shift"], of_a_seed.get(level, 0) * budget["quantile_shift_over_seed"])
        _refuse_above(kind, f"the shift of the {level} quantile", parity.quantile_shift[level], allowed)
    return parity


def _moved(expected: Floats, found: Floats) -> dict[str, Floats]:
    """How far each quantile moved, `[N, H]` by level, in mean widths of the 80 % band."""
    band = (expected[:, -1] - expected[:, 0]).mean()
    return {str(level): (found[:, i] - expected[:, i]) / band for i, level in enumerate(LEVELS)}


def _closes(forecaster: Forecaster, inputs: Sequence[ForecastInput]) -> Floats:
    """Quantiles `[N, Q, H]` of the close, as log-returns since the last one."""
    rows: dict[int, Floats] = {}
    buckets: dict[object, list[int]] = {}
    for row, item in enumerate(inputs):
        buckets.setdefault(forecaster.bucket(item), []).append(row)
    for waiting in buckets.values():
        for start in range(0, len(waiting), _BATCH_ROWS):
            batch = waiting[start : start + _BATCH_ROWS]
            for row, made in zip(batch, forecast(forecaster, [inputs[row] for row in batch]), strict=True):
                rows[row] = np.log(made.quantiles["close"] / inputs[row].last_close)
    return np.stack([rows[row] for row in range(len(inputs))])


def _refuse_above(kind: Kind, what: str, value: float, limit: float) -> None:
    if not value <= limit:
        raise ExportRefused(f"{kind.label}: {what} is {value:.3g}, its budget {limit:g}; nothing was stored")
