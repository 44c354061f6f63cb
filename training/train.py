"""One training run, a straight line: recipe, candles, windows, loop, evaluation, version in the store."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model_store.canary import canary_of
from model_store.manifest import Evaluation, Manifest, ModelLimits, Origin, TrainingRecord
from model_store.store import CANDIDATE, PRODUCTION, LoadedVersion, ModelStore
from models.families import build_forecaster
from models.forecaster import Forecaster, served_sampling
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig
from models.layers import load_strictly
from models.toto.network import TotoConfig, TotoNetwork
from models.toto.transform import transform_of
from training import processes
from training.candle_files import Series, digest
from training.evaluate import baselines, evaluate, summary, windows
from training.initial import damp_residuals, start_at_random_walk, start_with_bits
from training.loop import Judgement, Objective, Run, Selection, fit
from training.losses import LOSSES
from training.objectives import NextPatch, NextToken, TokenizerReconstruction
from training.packed import pack, pack_folder
from training.recipe import Recipe
from training.resume import RunFolder, run_folder
from training.scores import Scores
from training.tuning import adapter_of, merged, open_up
from training.windows import (
    Origins,
    Part,
    Split,
    WindowSampler,
    day,
    joined,
    rolling_origins,
    split_by_parts,
    split_from_recipe,
)

Weights = Mapping[str, Tensor]
Track = Callable[[str, float, str], None]  # what, share done, one line


class RunPhase(Protocol):
    """Runs the phase of this name; the weights that would be published are judged where there are such."""

    def __call__(self, phase: str, objective: Objective, published: Callable[[], Weights] | None = None) -> Run: ...


@dataclass(frozen=True)
class Trained:
    """Fitted weights and what each phase did."""

    weights: Weights
    runs: dict[str, Run]
    adapter: Weights = field(default_factory=dict)  # what the weights have added in, if there is any


@dataclass(frozen=True)
class Prepared:
    """A recipe with its candles."""

    recipe: Recipe
    series: Sequence[Series]
    split: Split
    origins: Mapping[Part, Origins]  # of the evaluation that is published
    choosing: Origins | None  # of the val part, among weights
    base: LoadedVersion | None = None  # what training starts from, unless from scratch

    @cached_property
    def data_digest(self) -> str:
        """Of all candles: hashing them is the one thing that reads every page of them."""
        return digest(self.series)


def train(recipe: Recipe, store: ModelStore, track: Track, home: Path, *, restart: bool = False) -> Manifest:
    """Fit, evaluate and publish a recipe; the version becomes `candidate`, and `production` where there is none.

    A run that was killed goes on, unless it is to `restart`: where it stands is kept under `home`. Processes that
    torchrun started share the work, and `home` and `store`; the first of them evaluates and publishes.
    """
    with processes.together():
        return _train(recipe, store, track, home, restart)


def _train(recipe: Recipe, store: ModelStore, track: Track, home: Path, restart: bool) -> Manifest:
    base = store.load(recipe.tune.base) if recipe.tune else None
    recipe = _based(recipe, base) if base else recipe
    prepared = replace(prepare(recipe, home / "cache"), base=base)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with run_folder(home / "runs", recipe, prepared.data_digest) as folder:
        if restart:
            folder.clear()
        manifest = _fit_and_publish(prepared, store, track, folder)
        folder.clear()
    return manifest


def _based(recipe: Recipe, base: LoadedVersion) -> Recipe:
    """The recipe with the network of `base`, named by its version; ValueError if it cannot do what is asked."""
    manifest, limits = base.manifest, base.manifest.limits
    name = f"{manifest.model}@{manifest.version}"
    if manifest.family != recipe.family:
        raise ValueError(f"{name} is of the family {manifest.family}, not {recipe.family}")
    if recipe.context > limits.max_context or recipe.horizon > limits.max_horizon:
        raise ValueError(f"{name} takes {limits.max_context} candles and {limits.max_horizon} steps at most")
    assert recipe.tune is not None
    tune = recipe.tune.model_copy(update={"base": name})
    return recipe.model_copy(update={"network": dict(base.config), "tune": tune})


def _fit_and_publish(prepared: Prepared, store: ModelStore, track: Track, folder: RunFolder) -> Manifest:
    recipe = prepared.recipe

    def run(phase: str, objective: Objective, published: Callable[[], Weights] | None = None) -> Run:
        selection = (
            Selection(recipe.select, partial(_judge, prepared, published)) if recipe.select and published else None
        )
        report = partial(track, f"{recipe.name} {phase}")
        return fit(objective, recipe.phases[phase], report, folder.place(phase), selection)

    trained = _FITTERS[recipe.family](prepared, run)
    if processes.rank() == 0:
        _publish_candidate(prepared, trained, store, track)
    processes.wait()
    return store.manifest(f"{recipe.name}@{CANDIDATE}")


def _publish_candidate(prepared: Prepared, trained: Trained, store: ModelStore, track: Track) -> None:
    recipe = prepared.recipe
    forecaster = build_forecaster(recipe.family, recipe.network, trained.weights)
    scores = {part: score(forecaster, prepared, part, track) for part in prepared.origins}
    manifest = publish(prepared, trained, forecaster, scores, store)
    store.set_alias(manifest.model, CANDIDATE, manifest.version)
    if PRODUCTION not in store.aliases(manifest.model):
        store.promote(f"{manifest.model}@{manifest.version}")


def prepare(recipe: Recipe, cache: Path | None = None) -> Prepared:
    """Map the recipe's candles, parsed into `cache` if need be, and split them.

    CandleFileError or ValueError say what is missing.
    """
    series, split = _whole(recipe, recipe.data.folder, cache) if recipe.data.folder else _parted(recipe, cache)
    parts: dict[Part, int] = {"test": recipe.evaluate.stride}
    if split.unseen:
        parts["unseen"] = recipe.evaluate.unseen_stride
    origins = {part: _origins(recipe, series, split, part, stride) for part, stride in parts.items()}
    choosing = _origins(recipe, series, split, "val", recipe.select.stride) if recipe.select else None
    return Prepared(recipe, series, split, origins, choosing)


def _whole(recipe: Recipe, folder: Path, cache: Path | None) -> tuple[Sequence[Series], Split]:
    series = _candles(recipe, folder, cache)
    return series, split_from_recipe(recipe.split, series, recipe.horizon)


def _parted(recipe: Recipe, cache: Path | None) -> tuple[Sequence[Series], Split]:
    """Contexts may reach back from one part into those before it: each symbol is one series."""
    parts = [_candles(recipe, root, cache) if root else [] for root in recipe.data.roots]
    split = split_by_parts(parts, horizon=recipe.horizon, unseen=recipe.split.get("unseen", ()))
    return pack(joined(parts), cache), split


def _candles(recipe: Recipe, folder: Path, cache: Path | None) -> Sequence[Series]:
    data = recipe.data
    found = pack_folder(folder, cache, adjust=data.adjust, undo_splits=data.undo_splits).of_interval(data.interval)
    if not found:
        raise ValueError(f"{folder} has no {data.interval} candles")
    return found


def _origins(recipe: Recipe, series: Sequence[Series], split: Split, part: Part, stride: int) -> Origins:
    origins = rolling_origins(series, split, part, stride=stride, min_context=recipe.context)
    if not len(origins):
        needed = recipe.context + recipe.horizon
        raise ValueError(f"the {part} part has no origin: it needs {needed} candles, {recipe.horizon} of them in it")
    return origins


# -- fitting ---------------------------------------------------------------------------------------


def _fit_toto(prepared: Prepared, run: RunPhase) -> Trained:
    recipe = prepared.recipe
    torch.manual_seed(recipe.seed)
    network = TotoNetwork(TotoConfig.from_published(recipe.network["network"]))
    if prepared.base and recipe.tune:
        load_strictly(network, prepared.base.weights, "Toto")
        open_up(network, "toto", recipe.tune)
    else:
        start_at_random_walk(network)
    length = recipe.context + network.config.patch_size
    objective = NextPatch(
        network=network,
        samplers={bars: _sampler(prepared, length * bars) for bars in recipe.objective.bars},
        transform=transform_of(recipe.network.get("log_scales")),
        context=recipe.context,
        rng=np.random.default_rng(recipe.seed),
        pointwise=LOSSES[recipe.objective.loss],
        holds_location=prepared.base is None,
    )
    runs = {"network": run("network", objective, lambda: merged(network))}
    return Trained(merged(network), runs, adapter_of(network))


def _fit_kronos(prepared: Prepared, run: RunPhase) -> Trained:
    recipe = prepared.recipe
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    sampler = _sampler(prepared, recipe.context + (recipe.objective.ahead or recipe.horizon))
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(recipe.network["tokenizer"]))
    predictor = KronosPredictor(PredictorConfig.from_published(recipe.network["predictor"]))
    both = torch.nn.ModuleDict({"tokenizer": tokenizer, "predictor": predictor})
    if prepared.base:
        load_strictly(both, prepared.base.weights, "Kronos")
    else:
        for blocks in (tokenizer.encoder, tokenizer.decoder):
            damp_residuals(blocks, 0.1)
    runs = {}
    if "tokenizer" in recipe.phases:
        runs["tokenizer"] = run("tokenizer", TokenizerReconstruction(tokenizer, sampler, recipe.context, rng))
    if recipe.tune:
        open_up(predictor, "kronos", recipe.tune)
    else:
        start_with_bits(predictor)
    next_token = NextToken(predictor, tokenizer, sampler, recipe.context, rng)
    runs["predictor"] = run("predictor", next_token, lambda: merged(both))
    return Trained(merged(both), runs, adapter_of(both))


_FITTERS: Mapping[str, Callable[[Prepared, RunPhase], Trained]] = {
    "toto": _fit_toto,
    "kronos": _fit_kronos,
}


def _sampler(prepared: Prepared, length: int) -> WindowSampler:
    return WindowSampler(prepared.series, prepared.split, length, calendar=prepared.recipe.data.calendar)


# -- judging and publishing ------------------------------------------------------------------------


def score(forecaster: Forecaster, prepared: Prepared, part: Part, track: Track) -> Scores:
    """Rolling-origin scores of the recipe's evaluation on one part of its split."""
    recipe, origins, judged = prepared.recipe, prepared.origins[part], 0

    def advance(rows: int) -> None:
        nonlocal judged
        judged += rows
        track(f"{recipe.name} evaluate {part}", judged / len(origins), f"{judged} origins")

    return _evaluate(forecaster, prepared, origins, recipe.evaluate.samples, advance)


def _judge(prepared: Prepared, published: Callable[[], Weights]) -> Judgement:
    recipe = prepared.recipe
    assert recipe.select is not None
    assert prepared.choosing is not None
    forecaster = build_forecaster(recipe.family, recipe.network, published())
    scores = _evaluate(forecaster, prepared, prepared.choosing, recipe.select.samples)
    relative = np.abs(scores.errors).mean() / np.abs(scores.naive_errors).mean()
    return Judgement(crps=float(scores.crps.mean()), skill_vs_naive=float(1 - relative))


def _evaluate(
    forecaster: Forecaster,
    prepared: Prepared,
    origins: Origins,
    samples: int,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    recipe = prepared.recipe
    return evaluate(
        forecaster,
        prepared.series,
        origins,
        sampling=replace(served_sampling(_serving(recipe)), samples=samples),
        lookback=recipe.context,
        calendar=recipe.data.calendar,
        batch_rows=recipe.evaluate.batch_rows,
        progress=progress,
    )


def publish(
    prepared: Prepared, trained: Trained, forecaster: Forecaster, scores: Mapping[Part, Scores], store: ModelStore
) -> Manifest:
    """Store weights, config, evaluations and the drift baseline as one version."""
    recipe, limits = prepared.recipe, forecaster.limits
    fields: dict[str, Any] = {
        "model": recipe.name,
        "family": recipe.family,
        "origin": _origin(prepared),
        "limits": ModelLimits(
            min_context=limits.min_context,
            max_context=limits.max_context,
            max_horizon=limits.max_horizon,
            max_total=limits.max_total,
        ),
        "serving": _serving(recipe),
        "training": _record(prepared, trained),
        "evaluations": tuple(summary(part) for part in scores.values()),
        "baselines": baselines(scores["test"]),
        "canary": canary_of(forecaster),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_revision": _revision(),
    }
    return store.put(fields, recipe.network, trained.weights, trained.adapter, windows(scores.values()))


def _origin(prepared: Prepared) -> Origin:
    """Weights that others' weights were tuned to keep their licence."""
    source, base = f"{prepared.recipe.name}.toml", prepared.base
    if base is None:
        return Origin(kind="trained", source=source, licence="Apache-2.0")
    return Origin(kind="trained", source=source, revision=base.manifest.version, licence=base.manifest.origin.licence)


def _serving(recipe: Recipe) -> dict[str, Any]:
    return recipe.serving.model_dump(exclude_none=True)


def _record(prepared: Prepared, trained: Trained) -> TrainingRecord:
    recipe, split = prepared.recipe, prepared.split
    spans = [item.timestamps[split.targets(item, "train")] for item in prepared.series]
    fitted = [(item.symbol, span) for item, span in zip(prepared.series, spans, strict=True) if len(span)]
    return TrainingRecord(
        recipe=recipe.model_dump(mode="json"),
        data_digest=prepared.data_digest,
        symbols=tuple(symbol for symbol, _ in fitted),
        interval=recipe.data.interval,
        start=day(min(int(span[0]) for _, span in fitted)),
        end=day(max(int(span[-1]) for _, span in fitted)),
        notes=tuple(f"{phase}: {note}" for phase, run in trained.runs.items() for note in run.notes),
        losses={phase: run.loss for phase, run in trained.runs.items()},
        steps=sum(run.steps for run in trained.runs.values()),
        seconds=round(sum(run.seconds for run in trained.runs.values()), 1),
        seed=recipe.seed,
    )


def verdict(evaluation: Evaluation) -> str:
    """One line: the skill that was reached, against naive and against the walk."""
    skill, ratio = evaluation.metrics["skill_vs_naive"], evaluation.metrics["crps_ratio_walk"]
    coverage = evaluation.metrics["coverage_80"].value
    return (
        f"{evaluation.windows}: skill vs naive {skill.value:+.3f}{_interval(skill.low, skill.high)}, CRPS"
        f" {ratio.value:.3f} x the random walk's{_interval(ratio.low, ratio.high)}, 80 % band covers {coverage:.0%}"
    )


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def _revision() -> str | None:
    """The commit of the checkout that trains, if it is one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
