"""Score stored versions side by side on identical origins."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import lru_cache, partial
from pathlib import Path

from model_store.store import ModelStore
from models.calendars import Calendar
from models.forecaster import Forecaster, Sampling, served_aggregate, served_sampling, usual_lookback
from training.baselines import BASELINES, LOOKBACK, baseline
from training.candle_files import Series
from training.cluster import Call, Cluster
from training.evaluate import Predictions, calendars_of, gathered, pieces, predict, side_by_side
from training.judged import Judged, judge
from training.outcomes import outcomes
from training.packed import pack_folder
from training.scores import Scores
from training.train import Track, refuse_leak
from training.windows import Origins, Part, Split, day, rolling_origins, split_from_recipe

_PATHS = 64  # of a version that does not say how many it serves with


def load_forecaster(store: ModelStore, reference: str) -> tuple[str, Forecaster, int, Sampling, str]:
    """The name@version, forecaster, usual lookback, sampling and aggregate of a stored version."""
    version = store.load(reference)
    manifest = version.manifest
    forecaster = version.build()
    return (
        f"{manifest.model}@{manifest.version}",
        forecaster,
        usual_lookback(manifest.family, manifest.serving, manifest.limits.max_context),
        served_sampling({"samples": _PATHS, **manifest.serving}),
        served_aggregate(manifest.serving),
    )


def compare(
    store: ModelStore,
    references: Sequence[str],
    baselines: Sequence[str],
    folder: Path,
    *,
    parts: Sequence[Part],
    stride: int,
    samples: int | None,
    val_from: date,
    test_from: date,
    unseen: Sequence[str],
    horizon: int | None = None,
    track: Track | None = None,
    workers: Cluster | None = None,
) -> list[Judged]:
    """Every reference and baseline over one folder's candles: part by part, in each all from the same origins.

    Where there are `workers`, they forecast, and the numbers are the same.

    The dates and `unseen` must be those of the models' training for `test` and `unseen` to mean what they say;
    ValueError if a version was trained on later candles or on an unseen symbol.
    """
    rivals = {name: (baseline(name), LOOKBACK, Sampling(), "median") for name in baselines}
    loaded = [load_forecaster(store, reference) for reference in references]
    series = pack_folder(folder)
    steps = horizon or min(min(f.limits.max_horizon for _, f, *_ in loaded), 64)
    split = split_from_recipe({"val_from": val_from, "test_from": test_from, "unseen": unseen}, series, steps)
    for reference in references:
        refuse_leaks(store, reference, split, parts)
    context = max(lookback for _, _, lookback, *_ in loaded)
    entrants = {
        name: (forecaster, lookback, replace(sampling, samples=samples or sampling.samples), aggregate)
        for name, forecaster, lookback, sampling, aggregate in loaded
    }
    by_symbol = {item.symbol: item for item in series}
    score = partial(_spread, workers, store.where) if workers else side_by_side
    found = []
    for part in parts:
        origins = rolling_origins(series, split, part, stride=stride, min_context=context)
        scores = score(entrants | rivals, series, origins, progress=track and counted(track, origins))
        found += [judge(name, each, by_symbol) for name, each in scores.items()]
    return found


def refuse_leaks(store: ModelStore, reference: str, split: Split, parts: Sequence[Part]) -> None:
    """ValueError if the version, or a member of the ensemble that it is, has seen what it would be judged by."""
    manifest = store.manifest(reference)
    refuse_leak(manifest, split)
    members = store.members(manifest)
    for member in members:
        refuse_leak(store.manifest(member), split)
    if members:
        until = store.config(manifest)["learnt"]["until"]
        if "val" in parts or until >= day(split.test_from):
            told = f"the weights of {manifest.model}@{manifest.version} were learnt on candles up to {until}"
            raise ValueError(f"{told}: judge it by later ones")


def _spread(
    workers: Cluster,
    store_root: str,
    entrants: Mapping[str, tuple[Forecaster, int, Sampling, str]],
    series: Sequence[Series],
    origins: Origins,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Scores]:
    """`side_by_side`, by workers that load the entrants themselves."""
    facts, cut = outcomes(series, origins), pieces(origins)
    calendars = calendars_of(series, origins)
    shared = workers.put({index: series[index] for index in calendars}), workers.put(calendars)
    names = list(entrants)
    calls = [
        Call(f"{name} {_title(series, piece)}", _predict, (store_root, name, *shared, piece, *asked))
        for name, (_, *asked) in entrants.items()
        for piece in cut
    ]

    def done(place: int) -> None:
        if progress:
            progress(names[place // len(cut)], len(cut[place % len(cut)]))

    found = workers.each(calls, done)
    return {name: gathered(facts, found[k * len(cut) : (k + 1) * len(cut)]) for k, name in enumerate(names)}


def _predict(
    store_root: str,
    name: str,
    series: Mapping[int, Series],
    calendars: Mapping[int, Calendar],
    piece: Origins,
    lookback: int,
    sampling: Sampling,
    aggregate: str,
) -> Predictions:
    """In a worker."""
    return predict(_entrant(store_root, name), series, calendars, piece, lookback, sampling, aggregate)


@lru_cache(maxsize=2)  # pieces come entrant by entrant
def _entrant(store_root: str, name: str) -> Forecaster:
    return baseline(name) if name in BASELINES else load_forecaster(ModelStore(store_root), name)[1]


def _title(series: Sequence[Series], piece: Origins) -> str:
    first, last = (
        f"{series[index].symbol} {day(int(series[index].timestamps[origin]))}"
        for index, origin in (piece.pairs[0], piece.pairs[-1])
    )
    return f"{piece.part} {first} to {last}"


def counted(track: Track, origins: Origins) -> Callable[[str, int], None]:
    """Tells `track` how far each forecaster has come, as `side_by_side` reports it."""
    done: Counter[str] = Counter()

    def advance(name: str, rows: int) -> None:
        done[name] += rows
        track(f"{name} {origins.part}", done[name] / len(origins), f"{done[name]} origins")

    return advance
