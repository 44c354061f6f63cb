"""Windows that an evaluation and a search score in a second of one core, against the reference in a loop over them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import cycle
from typing import Final

import numpy as np
import torch

from bench.forecasts import CONTEXT, HORIZON, QUICK_SAMPLES, REFERENCE, TOTO_HORIZON, TOTO_SAMPLES
from bench.published import random_weights, request, toto_config
from bench.rows import Row
from bench.service import put_version
from bench.timing import Work, median_of, race
from bench.workbench import KRONOS_SMALL, TOTO, Workbench
from model_store.store import ModelStore
from models.forecaster import Forecaster, ForecastInput, Sampling
from training.candle_files import Series, load
from training.evaluate import calendars_of, evaluate, inputs
from training.presets import write_recipe
from training.recipe import parse_recipe
from training.sample_data import write_samples
from training.search import Task
from training.trial import Job, run_trial
from training.windows import Origins, rolling_origins, split_by_dates

_WINDOWS: Final = 16
_PATHS: Final = 32  # Kronos
_TOTO_LOOKBACK: Final = 512
_OURS: Final = "eager float32"  # what an evaluation and a search forecast with


def kronos(bench: Workbench) -> list[Row]:
    """Kronos-small."""
    windows = _Windows.of_samples(bench, CONTEXT, HORIZON, _paths(bench))
    forecaster = _stored(bench, KRONOS_SMALL)[0].load(KRONOS_SMALL).build()
    ours = partial(windows.evaluate, forecaster=forecaster)
    return _kronos_row(bench, windows, ours, "evaluation of Kronos-small")


def tuning(bench: Workbench) -> list[Row]:
    """One trial of a search for Kronos-small's serving settings."""
    paths = _paths(bench)
    windows = _Windows.of_samples(bench, CONTEXT, HORIZON, paths)
    store, version = _stored(bench, KRONOS_SMALL)
    recipe = parse_recipe(write_recipe("quick", store, version, bench.folder / "samples", cache=bench.home))
    settings = {"serving.lookback": CONTEXT, "serving.samples": paths}
    job = Job(recipe, {"search": windows.origins}, store.where, bench.home, bench.home, version)
    return _kronos_row(bench, windows, partial(run_trial, job, Task(settings)), "trial of Kronos-small's settings")


def toto(bench: Workbench) -> list[Row]:
    """Toto-base. The reference draws as many samples as its documentation does, or fewer in a hurry."""
    samples = QUICK_SAMPLES if bench.quick else TOTO_SAMPLES
    windows = _Windows.of_samples(bench, _TOTO_LOOKBACK, TOTO_HORIZON, samples)
    forecaster = _stored(bench, TOTO)[0].load(TOTO).build()
    return _row(
        bench,
        windows,
        partial(windows.evaluate, forecaster=forecaster),
        partial(bench.toto_reference.forecast, samples=samples),
        partial(bench.toto_reference.forecast, windows.items[0], None),
        work=f"evaluation of Toto-base, {_TOTO_LOOKBACK}→{TOTO_HORIZON}",
        against=f"TotoForecaster.forecast in a loop, {samples} samples",
        reach=500 * samples / TOTO_SAMPLES,
    )


@dataclass(frozen=True, eq=False)
class _Windows:
    """Windows of the sample candles, and what both sides are asked at each."""

    series: Sequence[Series]
    origins: Origins
    lookback: int
    sampling: Sampling
    items: Sequence[ForecastInput]

    @classmethod
    def of_samples(cls, bench: Workbench, lookback: int, horizon: int, samples: int) -> "_Windows":
        folder = bench.folder / "samples"
        if not folder.is_dir():
            write_samples(folder)
        series = [item for item in load(folder)[0] if len(item) > 2 * lookback]
        split = split_by_dates(date(2009, 1, 1), date(2010, 6, 1), horizon=horizon)
        found = rolling_origins(series, split, "test", stride=1, min_context=lookback)
        origins = Origins("test", horizon, found.pairs[:: len(found) // _WINDOWS][:_WINDOWS])
        sampling = Sampling(samples=samples, stratified=False)
        items = list(inputs(series, calendars_of(series, origins), origins, lookback, sampling))
        return cls(series, origins, lookback, sampling, items)

    def evaluate(self, forecaster: Forecaster) -> None:
        evaluate(forecaster, self.series, self.origins, sampling=self.sampling, lookback=self.lookback)


def _paths(bench: Workbench) -> int:
    return QUICK_SAMPLES if bench.quick else _PATHS


def _stored(bench: Workbench, name: str) -> tuple[ModelStore, str]:
    """A store without artefacts, and the version of random weights in it."""
    family, config = (
        ("toto", toto_config(dict(bench.toto_network))) if name == TOTO else ("kronos", dict(bench.kronos_config))
    )
    store = ModelStore(bench.folder / "evaluated")
    return store, put_version(store, name, family, config, random_weights(family, config))


def _kronos_row(bench: Workbench, windows: _Windows, ours: Work, what: str) -> list[Row]:
    paths, reference = windows.sampling.samples, bench.kronos_reference
    return _row(
        bench,
        windows,
        ours,
        reference.forecast,
        partial(reference.forecast, request(CONTEXT, HORIZON, 0, samples=1)),
        work=f"{what}, {CONTEXT}→{HORIZON}, {paths} paths",
        against=f"KronosPredictor.predict in a loop, sample_count={paths}",
        reach=60,
    )


def _row(
    bench: Workbench,
    windows: _Windows,
    ours: Work,
    theirs: Callable[[ForecastInput], object],
    warm_up: Work,
    *,
    work: str,
    against: str,
    reach: float,
) -> list[Row]:
    """How many times the windows per second of a core: in a turn the reference takes one window, and ours takes all."""
    if bench.device != "cpu":
        return []
    upcoming, count = cycle(windows.items), len(windows.items)
    sides: dict[str, Work] = {REFERENCE: lambda: theirs(next(upcoming)), _OURS: ours}
    with _one_thread():
        found = race(
            sides,
            seconds=bench.seconds(60),
            stopwatch=_processor_time,
            warm_up={REFERENCE: warm_up},
            at_least=1 if bench.quick else 2,
        )
    ratio = median_of(count * np.divide(found.seconds[REFERENCE], found.seconds[_OURS]))
    per_second = {REFERENCE: 1 / found.median(REFERENCE), _OURS: count / found.median(_OURS)}
    runtime, dtype = _OURS.split()
    detail = {
        "runtime": runtime,
        "dtype": dtype,
        "rounds": found.rounds,
        "interval": [ratio.low, ratio.high],
        "windows": count,
        "per_second": per_second,
    }
    return [Row(f"{work}, windows per core", against, ratio.value, reach, "higher", "×", detail)]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _processor_time(work: Work) -> float:
    """Seconds that this process kept processors busy with `work`, whatever else ran beside it."""
    started = time.process_time()
    work()
    return time.process_time() - started
