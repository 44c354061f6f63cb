"""Better settings than the current ones, if there are any: of a recipe's training, or of a stored version."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from model_store.manifest import Manifest, SelectedOn
from model_store.store import LoadedVersion, ModelStore
from models.forecaster import served_aggregate, served_sampling, usual_lookback
from training.evaluate import summary, windows
from training.imported import Imported, first_trials, widened
from training.presets import write_recipe
from training.recipe import Knob, Recipe, Value, parse_recipe
from training.resume import run_folder
from training.study import Plan, Study, Tuned
from training.train import (
    Prepared,
    Track,
    based,
    drift_baselines,
    fit_phases,
    judge_and_publish,
    prepare,
    prepare_one,
    provenance,
    refuse_leak,
    score,
)
from training.trial import Job, prepared_for

_SERVING: Final = "serving."
_INSTANTS: Final = {"val_from", "test_from"}


# -- a recipe --------------------------------------------------------------------------------------


def tune_recipe(recipe: Recipe, store: ModelStore, track: Track, home: Path, plan: Plan) -> Tuned:
    """Train the recipe with other settings in each trial; the winner's weights become the name's candidate.

    What is searched is its `search`, by default `training_space`. ValueError where the val part is too short.
    """
    if recipe.tune and recipe.tune.per_symbol:
        raise ValueError("with per_symbol no settings are searched: name one symbol in data.symbols instead")
    known, base = based(recipe, store, plan.device)
    prepared = prepare(known, home / "cache", base)
    space, current = recipe.search or training_space(recipe), recipe.model_copy(update={"tune": known.tune})

    def publish(job: Job, selected: SelectedOn) -> Manifest:
        """The very weights that were decided about: their training stands where it ended."""
        trial = prepared_for(job, job.recipe.with_settings(selected.settings))
        with run_folder(job.runs, trial.recipe, "") as folder:
            trained = fit_phases(trial, track, folder)
        return judge_and_publish(replace(trial, origins=prepared.origins, selected_on=selected), trained, store, track)

    return Study(recipe.name, current, space, prepared, plan, store, home).run(publish, track)


def training_space(recipe: Recipe) -> dict[str, Knob]:
    """What is searched where the recipe does not say: of its last phase the rate, the decay of weights, the steps."""
    name, phase = list(recipe.phases.items())[-1]
    rate = phase.learning_rate
    return {
        f"phases.{name}.learning_rate": Knob(low=rate / 4, high=rate * 4, log=True),
        f"phases.{name}.weight_decay": Knob(choices=(0.0, 0.01, 0.1)),
        f"phases.{name}.steps": Knob(choices=tuple(max(1, phase.steps * k // 4) for k in (2, 3, 4))),
    }


# -- a stored version ------------------------------------------------------------------------------


def tune_version(
    reference: str,
    store: ModelStore,
    track: Track,
    home: Path,
    plan: Plan,
    folder: Path | None = None,
    space: Mapping[str, Knob] | None = None,
    *,
    per_symbol: bool = False,
    imported: Sequence[Imported] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> Iterator[Tuned]:
    """Ask a version with other settings in each trial; the winner's become the defaults of a child version.

    The windows are those of the version's own recipe, on `folder`'s candles if given; of a version that has none,
    the quick preset's. By symbol, each has a search and a child of its own, and their tests share the 5 % that may
    be wrong. What was `imported`, of the symbol where there is one, is tried first, and `warn` is told what of it
    cannot be, and which symbols have too few candles. ValueError where the val part is too short for any search.
    """
    version = store.load(reference)
    manifest = version.manifest
    recipe = _recipe_of(manifest, store, folder, home)
    horizon = max(recipe.horizon, plan.horizon or 0)  # of the trials, and of the child's own evaluation
    space = space or serving_space(manifest, horizon)
    _check_space(recipe, space)
    prepared = prepare(recipe, home / "cache")
    refuse_leak(manifest, prepared.split)  # of another folder's candles it may have seen some
    exact = f"{manifest.model}@{manifest.version}"
    symbols = _symbols(prepared) if per_symbol else [manifest.symbol]
    for each in imported:
        if None not in symbols and each.symbol not in symbols:
            warn(f"{each.path}: left out, {each.symbol} is not searched")
    current, lookbacks = _current(manifest), (manifest.limits.min_context, manifest.limits.room(horizon))
    studies: list[Study] = []
    for symbol in symbols:
        own = [each for each in imported if symbol in (None, each.symbol)]
        first = first_trials(own, recipe, space, current, lookbacks, warn)
        wide = widened(space, first)
        study = Study(manifest.model, recipe, wide, prepared, plan, store, home, exact, symbol, first=first)
        try:
            study.windows()
        except ValueError as error:
            if symbol is symbols[-1] and not studies:
                raise
            warn(f"{symbol}: left out, {error}")
        else:
            studies.append(study)
    for study in studies:
        publish = partial(_publish_child, version, prepared, study.symbol, store, track)
        yield replace(study, tests=len(studies)).run(publish, track)


def serving_space(manifest: Manifest, horizon: int) -> dict[str, Knob]:
    """What is searched of a version by default; ValueError where its family has no settings."""
    room = manifest.limits.room(horizon)
    lookbacks = sorted({max(manifest.limits.min_context, room // part) for part in (8, 4, 2, 1)})
    lookback = {"serving.lookback": Knob(choices=tuple(lookbacks))}
    if manifest.family == "toto":
        return lookback
    if manifest.family != "kronos":
        raise ValueError(f"a version of the family {manifest.family} has no settings to be searched")
    return lookback | {
        "serving.temperature": Knob(low=0.8, high=1.2),
        "serving.top_p": Knob(choices=(0.85, 0.9, 0.95, 1.0)),
        "serving.top_k": Knob(choices=(0, 64, 256)),
        "serving.samples": Knob(choices=(16, 32, 64)),
        "serving.aggregate": Knob(choices=("median", "mean", "trimmed_mean_10")),
    }


def _current(manifest: Manifest) -> dict[str, Value]:
    """What it is served by where a request does not say."""
    serving = {**asdict(served_sampling(manifest.serving)), "lookback": _lookback(manifest)}
    return {_SERVING + name: v for name, v in {**serving, "aggregate": served_aggregate(manifest.serving)}.items()}


def _check_space(recipe: Recipe, space: Mapping[str, Knob]) -> None:
    for name, knob in space.items():
        if not name.startswith(_SERVING):
            raise ValueError(f"{name} is no setting of a stored version: those begin with {_SERVING}")
        for value in knob.ends:
            recipe.with_settings({name: value})


def _symbols(prepared: Prepared) -> list[str]:
    """Those that have candles in the val part."""
    return [item.symbol for item in prepared.series if len(prepared.split.targets(item, "val"))]


def _recipe_of(manifest: Manifest, store: ModelStore, folder: Path | None, home: Path) -> Recipe:
    """What made the version or, if it does not say, what the quick preset would; with the settings it is served by."""
    if manifest.training:
        content = _restored(manifest.training.recipe)
        if folder:
            content["data"] |= {"folder": folder, "train_root": None, "val_root": None, "test_root": None}
    elif folder:
        reference = f"{manifest.model}@{manifest.version}"
        content = parse_recipe(write_recipe("quick", store, reference, folder, cache=home / "cache")).model_dump()
    else:
        raise ValueError(f"{manifest.model} does not say what it was trained on: give --data")
    serving = {**manifest.serving, "lookback": _lookback(manifest)}
    if manifest.family == "kronos":
        serving["samples"] = served_sampling(manifest.serving).samples
    return Recipe.model_validate({**content, "serving": serving})


def _lookback(manifest: Manifest) -> int:
    return usual_lookback(manifest.family, manifest.serving, manifest.limits.max_context)


def _restored(record: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content from a manifest's, in which instants are text, and what was tuned has its base's network."""
    split = {k: datetime.fromisoformat(v) if k in _INSTANTS else v for k, v in record["split"].items()}
    content = {**record, "data": dict(record["data"]), "split": split}
    return content | ({"network": {}} if record.get("tune") else {})


def _publish_child(
    version: LoadedVersion,
    prepared: Prepared,
    symbol: str | None,
    store: ModelStore,
    track: Track,
    job: Job,
    selected: SelectedOn,
) -> Manifest:
    """The same weights with other serving defaults, judged anew, beside what they were."""
    manifest = version.manifest
    if symbol:
        [item] = (item for item in prepared.series if item.symbol == symbol)
        prepared = prepare_one(job.recipe, item, prepared.split)
    forecaster = version.build(job.device)
    before = replace(prepared, recipe=job.recipe)
    after = replace(prepared, recipe=job.recipe.with_settings(selected.settings), selected_on=selected)
    scores = {part: score(forecaster, after, part, track, manifest.model) for part in prepared.origins}
    beside = {part: score(forecaster, before, part, track, "before") for part in prepared.origins}
    chosen = {name.removeprefix(_SERVING): value for name, value in selected.settings.items()}
    origin = {"kind": "child", "source": manifest.model, "revision": manifest.version}
    fields = manifest.model_dump(exclude={"version", "files"}) | {
        "symbol": symbol,
        "origin": manifest.origin.model_copy(update=origin),
        "serving": {**manifest.serving, **chosen},
        "selected_on": selected,
        "evaluations": tuple(summary(own, beside[part]) for part, own in scores.items()),
        "baselines": drift_baselines(forecaster, after, scores["test"], track),
        **provenance(),
    }
    return store.put(fields, version.config, version.weights, version.adapter, windows(scores.values()))
