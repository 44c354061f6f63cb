"""How the time of a forecast grows with paths, with symbols in a batch, and with context."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bench.published import request
from bench.rows import Curve
from bench.workbench import Workbench
from models.forecaster import Forecaster, ForecastInput, forecast

Asked = Callable[[int], Sequence[ForecastInput]]


def curve_of_paths(bench: Workbench) -> list[Curve]:
    """Kronos: one symbol, 1 to 256 paths."""
    values = _thinned(bench, [1, 8, 32, 256])
    return _curve(bench, "Kronos-small 64→30, one symbol", "paths", values, bench.kronos, _with_paths)


def curve_of_symbols(bench: Workbench) -> list[Curve]:
    """Kronos: 1 to 64 symbols of one path each in a batch."""
    values = _thinned(bench, [1, 4, 16, 64])
    return _curve(bench, "Kronos-small 64→30, one path each", "symbols", values, bench.kronos, _with_symbols)


def curve_of_toto_symbols(bench: Workbench) -> list[Curve]:
    """Toto: 1 to 64 symbols of 512 candles in a batch."""
    values = _thinned(bench, [1, 4, 16, 64])
    return _curve(bench, "Toto-base 512→64", "symbols", values, bench.toto, _with_toto_symbols)


def curve_of_context(bench: Workbench) -> list[Curve]:
    """Toto: one symbol, 64 to 4096 candles."""
    longest = max(forecaster.limits.max_context for forecaster in bench.toto.values())
    values = _thinned(bench, [each for each in (64, 256, 1024, 4096) if each <= longest])
    return _curve(bench, "Toto-base →64, one symbol", "candles", values, bench.toto, _with_context)


def _with_paths(value: int) -> list[ForecastInput]:
    return [request(64, 30, 0, samples=value)]


def _with_symbols(value: int) -> list[ForecastInput]:
    return [request(64, 30, seed, samples=1) for seed in range(value)]


def _with_toto_symbols(value: int) -> list[ForecastInput]:
    return [request(512, 64, seed) for seed in range(value)]


def _with_context(value: int) -> list[ForecastInput]:
    return [request(value, 64, 0)]


def _thinned(bench: Workbench, values: list[int]) -> list[int]:
    """The ends and the middle, where time is short."""
    return [values[0], values[len(values) // 2], values[-1]] if bench.quick else values


def _curve(
    bench: Workbench, title: str, axis: str, values: list[int], ours: Mapping[str, Forecaster], asked: Asked
) -> list[Curve]:
    """Batches as large as the forecaster takes them; the time is that of all of them, per forecast."""
    measured: dict[str, list[float]] = {label: [] for label in ours}
    for value in values:
        items = asked(value)
        sides = {label: partial(_in_batches, each, items) for label, each in ours.items()}
        found = bench.race(sides, 2, at_least=1)
        for label in ours:
            measured[label].append(1e3 * found.median(label) / len(items))
    return [Curve(title, axis, values, measured)]


def _in_batches(forecaster: Forecaster, items: Sequence[ForecastInput]) -> None:
    rows = forecaster.max_rows(items[0])
    for first in range(0, len(items), rows):
        forecast(forecaster, items[first : first + rows])
