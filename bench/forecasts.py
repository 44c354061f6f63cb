"""Whole forecasts, from candles to quantiles, against the reference predictors called as a user calls them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bench.published import request
from bench.rows import Row
from bench.timing import Race, Work
from bench.workbench import Workbench
from models.forecaster import Forecaster, ForecastInput, forecast

REFERENCE = "reference"
CONTEXT, HORIZON = 64, 30  # Kronos
TOTO_HORIZON, TOTO_SAMPLES, DRAWN_SAMPLES, QUICK_SAMPLES = 64, 256, 128, 16


def kronos_one_path(bench: Workbench) -> list[Row]:
    """One path of one symbol."""
    return _kronos(bench, "Kronos-small 64→30, 1 path", 1, 1, reach=10, seconds=20)


def kronos_many_paths(bench: Workbench) -> list[Row]:
    """Thirty-two paths of one symbol, as a request has them by default."""
    return _kronos(bench, "Kronos-small 64→30, 32 paths", 1, 32, reach=60, seconds=45, at_least=1 if bench.quick else 2)


def kronos_many_symbols(bench: Workbench) -> list[Row]:
    """Sixteen symbols in one batch, per forecast; the reference is called for one after the other."""
    return _kronos(bench, "Kronos-small 64→30, 16 symbols at once", 16, 1, reach=30, seconds=45, at_least=2)


def toto_quantiles(bench: Workbench) -> list[Row]:
    """Exact quantiles against those of drawn samples. One round takes the reference minutes: there is but one.

    It draws half of what it would by default, and should take half as many times longer: its time is linear in them.
    """
    item, reference = request(_toto_context(bench), TOTO_HORIZON, seed=1), bench.toto_reference
    samples = QUICK_SAMPLES if bench.quick else DRAWN_SAMPLES
    at_once = min(samples, 16 if bench.device == "cpu" else 128)
    theirs = partial(reference.forecast, item, samples, at_once)
    warm_up = {REFERENCE: partial(reference.forecast, item, None)}
    found = bench.race(_sides(bench.toto, [item], theirs), 1, warm_up=warm_up, at_least=1)
    return _row(
        found,
        f"Toto-base {len(item.candles)}→64, quantiles",
        f"reference, {samples} samples",
        reach=500 * samples / TOTO_SAMPLES,
        samples_per_batch=at_once,
    )


def toto_mean(bench: Workbench) -> list[Row]:
    """The same forecast against the reference's single pass, which gives means only."""
    item = request(_toto_context(bench), TOTO_HORIZON, seed=1)
    found = bench.race(_sides(bench.toto, [item], partial(bench.toto_reference.forecast, item, None)), 30)
    return _row(found, f"Toto-base {len(item.candles)}→64", "reference, mean mode", reach=5)


def _toto_context(bench: Workbench) -> int:
    return max(forecaster.limits.max_context for forecaster in bench.toto.values())


def _kronos(
    bench: Workbench, work: str, symbols: int, paths: int, *, reach: float, seconds: float, at_least: int = 3
) -> list[Row]:
    items = [request(CONTEXT, HORIZON, seed, samples=paths) for seed in range(symbols)]
    theirs = partial(_each, bench.kronos_reference.forecast, items)
    short = request(CONTEXT, HORIZON, 0, samples=1)  # the reference's long calls are too long to do for nothing
    warm_up = {REFERENCE: partial(bench.kronos_reference.forecast, short)} if symbols * paths > 1 else None
    found = bench.race(_sides(bench.kronos, items, theirs), seconds, warm_up=warm_up, at_least=at_least)
    calls = f"{symbols} × " if symbols > 1 else ""
    return _row(found, work, f"{calls}KronosPredictor.predict, sample_count={paths}", reach=reach, forecasts=symbols)


def _sides(ours: Mapping[str, Forecaster], items: Sequence[ForecastInput], theirs: Work) -> dict[str, Work]:
    """The reference and every contender over the same requests."""
    return {REFERENCE: theirs, **{label: partial(forecast, each, items) for label, each in ours.items()}}


def _each(call: Any, items: Sequence[ForecastInput]) -> None:
    for item in items:
        call(item)


def _row(found: Race, work: str, against: str, *, reach: float, **detail: Any) -> list[Row]:
    """How many times longer the reference takes than the fastest contender."""
    fastest = min((side for side in found.seconds if side != REFERENCE), key=found.median)
    ratio = found.ratio(REFERENCE, fastest)
    runtime, dtype = fastest.split()
    milliseconds = {side: 1e3 * found.median(side) for side in found.seconds}
    about = {
        "runtime": runtime,
        "dtype": dtype,
        "rounds": found.rounds,
        "interval": [ratio.low, ratio.high],
        "milliseconds": milliseconds,
        **detail,
    }
    return [Row(work, against, ratio.value, reach, "higher", "×", about)]
