"""One forecast at a glance: from a folder of candles to a table and a fan chart, without a service."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from model_store.store import ModelStore
from models.candles import CLOSE, VARIATES
from models.forecaster import DEFAULT_HORIZON, Forecast, ForecastInput, forecast
from training import candle_files
from training.compare import load_forecaster
from training.windows import forecast_input, series_calendar

_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
_SHOWN_CANDLES = 120


@dataclass(frozen=True)
class Glance:
    """A forecast with what it was made from."""

    symbol: str
    model: str
    item: ForecastInput
    result: Forecast

    def as_json(self) -> dict[str, Any]:
        """The rows as `[timestamp, open, high, low, close, volume]` and the close's quantiles."""
        stamps = self.item.future_timestamps.tolist()
        rows = [[stamp, *row] for stamp, row in zip(stamps, self.result.point.tolist(), strict=True)]
        closes = zip(self.result.levels, self.result.quantiles["close"].tolist(), strict=True)
        return {
            "symbol": self.symbol,
            "model": self.model,
            "last_close": self.item.last_close,
            "forecast": rows,
            "quantiles": {"close": {str(level): values for level, values in closes}},
            "warnings": list(self.result.warnings),
        }


def forecast_symbol(
    store: ModelStore, symbol: str, folder: Path, *, reference: str, horizon: int | None, seed: int, samples: int
) -> Glance:
    """Forecast from the last candle of `symbol`'s file; LookupError names the symbols there are."""
    series = {item.symbol: item for item in candle_files.load(folder)[0]}
    if symbol.upper() not in series:
        raise LookupError(f"{folder} has no candles of {symbol}; it has: {', '.join(sorted(series))}")
    chosen = series[symbol.upper()]
    name, forecaster, lookback, sampling, aggregate = load_forecaster(store, reference)
    item = forecast_input(
        chosen,
        len(chosen) - 1,
        horizon=horizon or min(DEFAULT_HORIZON[forecaster.family], forecaster.limits.max_horizon),
        lookback=lookback,
        calendar=series_calendar(chosen),
    )
    sampling = replace(sampling, samples=samples)
    item = replace(item, levels=_LEVELS, seed=seed, sampling=sampling, aggregate=aggregate)
    return Glance(chosen.symbol, name, item, forecast(forecaster, [item])[0])


def forecast_table(glance: Glance) -> Table:
    """One row per step: the candle, and the 10-90 % band of its close."""
    table = Table(title=f"{glance.symbol} by {glance.model}", box=box.SIMPLE_HEAD)
    for name in ("opens (UTC)", *VARIATES, "close 10 %", "close 90 %"):
        table.add_column(name, justify="right")
    low, high = glance.result.quantiles["close"][0], glance.result.quantiles["close"][-1]
    for step, row in enumerate(glance.result.point):
        opened = np.datetime64(int(glance.item.future_timestamps[step]), "ms").astype("datetime64[m]")
        prices = [f"{value:.6g}" for value in row[: CLOSE + 1]]
        table.add_row(str(opened).replace("T", " "), *prices, f"{row[-1]:.4g}", f"{low[step]:.6g}", f"{high[step]:.6g}")
    if glance.result.warnings:
        table.caption = "\n".join(glance.result.warnings)
    return table


def draw_fan(glance: Glance, path: Path) -> None:
    """Write a PNG: recent closes, the point forecast, its 50 % and 80 % bands, the naive line."""
    from matplotlib.figure import Figure

    item, result = glance.item, glance.result
    past = slice(max(0, len(item.candles) - _SHOWN_CANDLES), None)
    times = item.timestamps[past].astype("datetime64[ms]")
    ahead = np.concatenate([item.timestamps[-1:], item.future_timestamps]).astype("datetime64[ms]")

    def from_last_close(values: Any) -> Any:
        return np.concatenate([[item.last_close], values])

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(times, item.candles[past, CLOSE], color="#1f2937", linewidth=1.2, label="close")
    closes = result.quantiles["close"]
    for low, high, shade, label in ((0, -1, 0.18, "80 % band"), (1, -2, 0.3, "50 % band")):
        band = (from_last_close(closes[low]), from_last_close(closes[high]))
        axes.fill_between(ahead, *band, color="#2563eb", alpha=shade, linewidth=0, label=label)
    axes.plot(ahead, from_last_close(result.point[:, CLOSE]), color="#2563eb", linewidth=1.6, label="forecast")
    axes.axhline(item.last_close, color="#9ca3af", linewidth=0.9, linestyle="--", label="naive: last close")
    axes.set_title(f"{glance.symbol}: {item.horizon} steps by {glance.model}", loc="left")
    axes.set_ylabel("price")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    figure.savefig(path, dpi=120)
