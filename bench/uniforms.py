"""How far few paths lie from many, stratified and independent: `python -m bench.uniforms` decides the default.

A trained Kronos forecasts real candles. 4,096 independent paths per origin are the truth; errors are those of the
close's mean and quantiles, in standard deviations of these paths at the same origin and step.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model_store.store import ModelStore
from models.candles import CLOSE, Floats
from models.forecaster import DEFAULT_HORIZON, DEFAULT_LEVELS, Forecaster, ForecastInput, Sampling, forecast
from models.quantiles import path_quantiles
from models.uniforms import derive_seed
from training import candle_files
from training.compare import load_forecaster
from training.windows import forecast_input, rolling_origins, series_calendar, split_by_dates

PATHS: Final = (4, 8, 16, 32, 64)
STATISTICS: Final = ("mean", *(f"quantile {level:g}" for level in DEFAULT_LEVELS))
_TRUTH: Final = (8, 512)  # draws of so many paths
_HORIZON: Final = DEFAULT_HORIZON["kronos"]


@dataclass(frozen=True)
class Row:
    """One statistic of so many paths, both ways."""

    paths: int
    statistic: str  # one of STATISTICS: its root mean square error; spread: variance / the truth's; coverage of 80 %
    independent: float
    stratified: float
    better: float | None = None  # share of the origins where the stratified error is the smaller one


def measure(forecaster: Forecaster, sampling: Sampling, inputs: Sequence[ForecastInput], seeds: int) -> list[Row]:
    """Both ways' errors over all inputs, `seeds` draws each."""
    truth = np.array([_truth(forecaster, sampling, item) for item in track(inputs, "the truth", transient=True)])
    rows: list[Row] = []
    for samples in track(PATHS, "few paths", transient=True):
        ways = []
        for stratified in (False, True):
            settings = replace(sampling, samples=samples, stratified=stratified)
            drawn = [_closes(forecaster, settings, inputs, seed) for seed in range(seeds)]
            ways.append(_Judged(np.stack(drawn), truth))
        rows += _rows(samples, *ways)
    return rows


def _truth(forecaster: Forecaster, sampling: Sampling, item: ForecastInput) -> Floats:
    """Sorted closes `[4096, H]`."""
    draws, samples = _TRUTH
    settings = replace(sampling, samples=samples, stratified=False)
    closes = [_closes(forecaster, settings, [item], f"truth {draw}")[0] for draw in range(draws)]
    return np.sort(np.concatenate(closes), axis=0)


def _closes(forecaster: Forecaster, sampling: Sampling, inputs: Sequence[ForecastInput], seed: int | str) -> Floats:
    """Closes `[B, S, H]` of one draw."""
    asked = [
        replace(item, sampling=sampling, with_paths=True, seed=derive_seed(seed, item.timestamps[-1], item.last_close))
        for item in inputs
    ]
    paths = [result.paths for result in forecast(forecaster, asked)]
    return np.stack([found[:, :, CLOSE] for found in paths if found is not None])


class _Judged:
    """One way's draws `[N, B, S, H]` against the truth `[B, 4096, H]`."""

    def __init__(self, drawn: Floats, truth: Floats) -> None:
        mean, spread = truth.mean(axis=1), truth.std(axis=1)
        expected = np.stack([mean, *path_quantiles(truth.swapaxes(0, 1), DEFAULT_LEVELS)])
        bands = path_quantiles(np.moveaxis(drawn, 2, 0), DEFAULT_LEVELS)  # [Q, N, B, H]
        found = np.concatenate([drawn.mean(axis=2)[None], bands])
        errors = (found - expected[:, None]) / spread
        self.by_origin = np.sqrt((errors**2).mean(axis=(1, 3)))  # [statistics, B]
        self.errors = np.sqrt((errors**2).mean(axis=(1, 2, 3)))
        self.spread = float((((drawn - mean[:, None]) / spread[:, None]) ** 2).mean())
        inside = [
            (truth >= low[:, None]) & (truth <= high[:, None]) for low, high in zip(bands[0], bands[-1], strict=True)
        ]
        self.coverage = float(np.mean(inside))


def _rows(paths: int, independent: _Judged, stratified: _Judged) -> Iterator[Row]:
    better = (stratified.by_origin < independent.by_origin).mean(axis=1)
    for index, name in enumerate(STATISTICS):
        errors = float(independent.errors[index]), float(stratified.errors[index])
        yield Row(paths, name, *errors, better=float(better[index]))
    yield Row(paths, "spread", independent.spread, stratified.spread)
    yield Row(paths, "coverage", independent.coverage, stratified.coverage)


def origins_after_training(
    store: ModelStore, model: str, folder: Path, count: int, lookback: int
) -> list[ForecastInput]:
    """`count` inputs, evenly spread over all symbols' candles that the model was not trained on."""
    record = store.manifest(model).training
    if record is None:
        raise click.ClickException(f"{model} does not say which candles it has seen: name a model trained here")
    series, _ = candle_files.load(folder)
    day = datetime.fromisoformat(record.end)
    split = split_by_dates(day, day, horizon=_HORIZON)
    pairs = rolling_origins(series, split, "test", stride=1, min_context=lookback).pairs
    chosen = [pairs[index] for index in np.linspace(0, len(pairs) - 1, count).astype(int)]
    return [
        forecast_input(series[i], origin, horizon=_HORIZON, lookback=lookback, calendar=series_calendar(series[i]))
        for i, origin in chosen
    ]


def table(rows: Sequence[Row]) -> Table:
    """The rows, a block per number of paths."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("paths", "statistic", "independent", "stratified", "ratio", "better at"):
        result.add_column(heading, justify="left" if heading == "statistic" else "right")
    for row in rows:
        better = "" if row.better is None else f"{row.better:.0%}"
        first, last = row.statistic == STATISTICS[0], row.statistic == "coverage"
        result.add_row(
            str(row.paths) if first else "",
            row.statistic,
            f"{row.independent:.3f}",
            f"{row.stratified:.3f}",
            f"{row.stratified / row.independent:.3f}",
            better,
            end_section=last,
        )
    return result


@click.command(help=__doc__)
@click.option("--store", "root", type=click.Path(path_type=Path), default=Path("model_store/artifacts"))
@click.option("--model", default="kronos-demo", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/samples"), show_default=True)
@click.option("--origins", default=21, show_default=True)
@click.option("--seeds", default=8, show_default=True, help="Draws at each origin, both ways.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def main(root: Path, model: str, data: Path, origins: int, seeds: int, *, as_json: bool) -> None:
    store = ModelStore(root)
    name, forecaster, lookback, sampling, _ = load_forecaster(store, model)
    rows = measure(forecaster, sampling, origins_after_training(store, model, data, origins, lookback), seeds)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        click.echo(f"{name}, {origins} origins x {seeds} seeds, top_p {sampling.top_p:g}; errors in the truth's sigmas")
        Console().print(table(rows))


if __name__ == "__main__":
    main()
