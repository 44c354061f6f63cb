"""Score stored versions side by side on identical origins."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from model_store.store import ModelStore
from models.forecaster import Forecaster, Sampling, served_sampling, usual_lookback
from training.baselines import LOOKBACK, baseline
from training.evaluate import side_by_side
from training.judged import Judged, judge
from training.packed import pack_folder
from training.train import Track, refuse_leak
from training.windows import Origins, Part, Split, day, rolling_origins, split_from_recipe


def load_forecaster(store: ModelStore, reference: str) -> tuple[str, Forecaster, int, Sampling]:
    """The name@version, forecaster, usual lookback and sampling defaults of a stored version."""
    version = store.load(reference)
    manifest = version.manifest
    forecaster = version.build()
    return (
        f"{manifest.model}@{manifest.version}",
        forecaster,
        usual_lookback(manifest.family, manifest.serving, manifest.limits.max_context),
        served_sampling(manifest.serving),
    )


def compare(
    store: ModelStore,
    references: Sequence[str],
    baselines: Sequence[str],
    folder: Path,
    *,
    parts: Sequence[Part],
    stride: int,
    samples: int,
    val_from: date,
    test_from: date,
    unseen: Sequence[str],
    horizon: int | None = None,
    track: Track | None = None,
) -> list[Judged]:
    """Every reference and baseline over one folder's candles: part by part, in each all from the same origins.

    The dates and `unseen` must be those of the models' training for `test` and `unseen` to mean what they say;
    ValueError if a version was trained on later candles or on an unseen symbol.
    """
    rivals = {name: (baseline(name), LOOKBACK, Sampling()) for name in baselines}
    loaded = [load_forecaster(store, reference) for reference in references]
    series = pack_folder(folder)
    steps = horizon or min(min(f.limits.max_horizon for _, f, _, _ in loaded), 64)
    split = split_from_recipe({"val_from": val_from, "test_from": test_from, "unseen": unseen}, series, steps)
    for reference in references:
        refuse_leaks(store, reference, split, parts)
    context = max(lookback for _, _, lookback, _ in loaded)
    entrants = {
        name: (forecaster, lookback, replace(sampling, samples=samples))
        for name, forecaster, lookback, sampling in loaded
    }
    by_symbol = {item.symbol: item for item in series}
    found = []
    for part in parts:
        origins = rolling_origins(series, split, part, stride=stride, min_context=context)
        scores = side_by_side(entrants | rivals, series, origins, progress=track and counted(track, origins))
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


def counted(track: Track, origins: Origins) -> Callable[[str, int], None]:
    """Tells `track` how far each forecaster has come, as `side_by_side` reports it."""
    done: Counter[str] = Counter()

    def advance(name: str, rows: int) -> None:
        done[name] += rows
        track(f"{name} {origins.part}", done[name] / len(origins), f"{done[name]} origins")

    return advance
