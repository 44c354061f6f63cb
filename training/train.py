"""One training run, a straight line: recipe, candles, windows, loop, evaluation, version in the store."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from model_store.canary import canary_of
from model_store.manifest import Baseline, Evaluation, Manifest, Origin, SelectedOn, TrainingRecord
from model_store.store import CANDIDATE, PRODUCTION, LoadedVersion, ModelStore
from models import scoring
from models.families import build_forecaster
from models.forecaster import Forecaster, served_aggregate, served_sampling
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig
from models.layers import load_strictly
from models.toto.network import TotoConfig, TotoNetwork
from models.toto.transform import transform_of
from training import processes
from training.candle_files import Series, digest
from training.evaluate import baselines, evaluate, summary, windows
from training.initial import damp_residuals, start_at_random_walk, start_with_bits
from training.loop import Judgement, Objective, Report, Run, Selection, fit
from training.losses import LOSSES
from training.objectives import NextPatch, NextToken, TokenizerReconstruction
from training.packed import Packed, pack, pack_folder
from training.recipe import Recipe, ServingTable
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
Watch = Callable[[float, Callable[[], Weights]], None]  # share done of the last phase, what would be published
_SHOWN: Final = 20  # symbols that a message lists
_BASELINE_BLOCKS: Final = 90  # with fewer, the drift alarm is raised several times as often by chance


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
class Base:
    """The stored version that training starts from, and that its result is judged beside."""

    version: LoadedVersion
    device: str = "cpu"

    @cached_property
    def forecaster(self) -> Forecaster:
        return self.version.build(self.device)


@dataclass(frozen=True)
class Prepared:
    """A recipe with its candles."""

    recipe: Recipe
    series: Sequence[Series]
    split: Split
    origins: Mapping[Part, Origins]  # of the evaluation that is published
    choosing: Origins | None  # of the val part, among weights
    base: Base | None = None  # unless training starts from scratch
    symbol: str | None = None  # the only one, which alone the version will serve
    device: str = "cpu"
    selected_on: SelectedOn | None = None  # what chose the recipe's settings, if a search did

    @property
    def model(self) -> str:
        """Whose version this will be."""
        return self.base.version.manifest.model if self.base and self.symbol else self.recipe.name

    @property
    def chose_by_val(self) -> bool:
        """Whether the val part had a say in the weights or the settings, or in the base's."""
        own = self.recipe.select is not None or self.selected_on is not None
        return own or bool(self.base and self.base.version.manifest.chose_by_val)

    @cached_property
    def data_digest(self) -> str:
        """Of all candles: hashing them is the one thing that reads every page of them."""
        return digest(self.series)


def train(
    recipe: Recipe,
    store: ModelStore,
    track: Track,
    home: Path,
    *,
    restart: bool = False,
    tensorboard: Path | None = None,
    device: str = "cpu",
) -> Manifest:
    """Fit, evaluate and publish a recipe; the version becomes `candidate`, and `production` where there is none.

    A run that was killed goes on, unless it is to `restart`: where it stands is kept under `home`. Processes that
    torchrun started share the work, and `home` and `store`; the first of them evaluates and publishes. What the run's
    training.log says goes into a folder under `tensorboard` as well.
    """
    with processes.together():
        return _train(recipe, store, track, home, restart, tensorboard, processes.own_device(device))


def _train(
    recipe: Recipe, store: ModelStore, track: Track, home: Path, restart: bool, tensorboard: Path | None, device: str
) -> Manifest:
    recipe, base = based(recipe, store, device)
    prepared = replace(prepare(recipe, home / "cache", base), device=device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with run_folder(home / "runs", recipe, prepared.data_digest, tensorboard) as folder:
        if restart:
            folder.clear()
        manifest = _fit_and_publish(prepared, store, track, folder)
        folder.clear()
    return manifest


def based(recipe: Recipe, store: ModelStore, device: str = "cpu") -> tuple[Recipe, Base | None]:
    """The recipe with the network and serving defaults of its base, named by its version, and that, if it has one.

    ValueError if it cannot do what is asked.
    """
    if recipe.tune is None:
        return recipe, None
    base = store.load(recipe.tune.base)
    manifest, limits = base.manifest, base.manifest.limits
    name = f"{manifest.model}@{manifest.version}"
    if manifest.family != recipe.family:
        raise ValueError(f"{name} is of the family {manifest.family}, not {recipe.family}")
    if recipe.context > limits.max_context or recipe.horizon > limits.max_horizon:
        raise ValueError(f"{name} takes {limits.max_context} candles and {limits.max_horizon} steps at most")
    tune = recipe.tune.model_copy(update={"base": name})
    serving = ServingTable.model_validate({**manifest.serving, **recipe.serving.model_dump(exclude_none=True)})
    changes = {"network": dict(base.config), "tune": tune, "serving": serving}
    return recipe.model_copy(update=changes), Base(base, device)


def refuse_leak(manifest: Manifest, split: Split) -> None:
    """ValueError if the version was trained on what the split keeps from training."""
    training = manifest.training
    if training is None:
        return  # an imported checkpoint does not say what it has seen
    name = f"{manifest.model}@{manifest.version}"
    if training.end >= day(split.val_from):
        raise ValueError(f"{name} was trained on candles up to {training.end}: let the val part begin later")
    if seen := split.unseen.intersection(training.symbols):
        raise ValueError(f"{name} was trained on {', '.join(sorted(seen))}: that is not unseen")


def _fit_and_publish(prepared: Prepared, store: ModelStore, track: Track, folder: RunFolder) -> Manifest:
    trained = fit_phases(prepared, track, folder)
    if processes.rank() == 0:
        manifest = judge_and_publish(prepared, trained, store, track)
        stand_as_candidate(manifest, store)
    processes.wait()
    return store.manifest(f"{prepared.model}@{CANDIDATE}")


def stand_as_candidate(manifest: Manifest, store: ModelStore) -> None:
    """A name's first version is its production too."""
    store.set_alias(manifest.model, CANDIDATE, manifest.version)
    if PRODUCTION not in store.aliases(manifest.model):
        store.promote(f"{manifest.model}@{manifest.version}")


def fit_phases(prepared: Prepared, track: Track, folder: RunFolder, watch: Watch | None = None) -> Trained:
    """Run every phase of the recipe, each from where it stands in `folder`; what `watch` raises ends it."""
    recipe = prepared.recipe

    def run(phase: str, objective: Objective, published: Callable[[], Weights] | None = None) -> Run:
        selection = (
            Selection(recipe.select, partial(_judge, prepared, published)) if recipe.select and published else None
        )

        def report(done: float, line: str) -> None:
            track(f"{recipe.name} {phase}", done, line)
            if watch and published:
                watch(done, published)

        return fit(objective, recipe.phases[phase], report, folder.place(phase), selection)

    return _FITTERS[recipe.family](prepared, run)


def prepare(recipe: Recipe, cache: Path | None = None, base: Base | None = None) -> Prepared:
    """Map the recipe's candles, parsed into `cache` if need be, and split them.

    CandleFileError or ValueError say what is missing, or what `base` has seen and must not have.
    """
    series, split = candles(recipe, cache)
    if base:
        refuse_leak(base.version.manifest, split)
    parts: dict[Part, int] = {"test": recipe.evaluate.stride}
    if split.unseen:
        parts["unseen"] = recipe.evaluate.unseen_stride
    return _prepared(recipe, series, split, parts, base)


def prepare_one(recipe: Recipe, item: Series, split: Split, base: Base | None = None) -> Prepared:
    """The recipe for one symbol alone; ValueError where that has too few candles."""
    alone = _prepared(recipe, [item], split, {"test": recipe.evaluate.stride}, base)
    return replace(alone, symbol=item.symbol, device=base.device if base else "cpu")


def _prepared(
    recipe: Recipe, series: Sequence[Series], split: Split, parts: Mapping[Part, int], base: Base | None
) -> Prepared:
    origins = {part: _origins(recipe, series, split, part, stride) for part, stride in parts.items()}
    choosing = _origins(recipe, series, split, "val", recipe.select.stride) if recipe.select else None
    return Prepared(recipe, series, split, origins, choosing, base)


def candles(recipe: Recipe, cache: Path | None) -> tuple[Sequence[Series], Split]:
    """The recipe's candles, parsed into `cache` if need be, and how they are split."""
    return _whole(recipe, recipe.data.folder, cache) if recipe.data.folder else _parted(recipe, cache)


def _whole(recipe: Recipe, folder: Path, cache: Path | None) -> tuple[Sequence[Series], Split]:
    [series] = _chosen(recipe, [_candles(recipe, folder, cache)])
    return series, split_from_recipe(recipe.split, series, recipe.horizon)


def _parted(recipe: Recipe, cache: Path | None) -> tuple[Sequence[Series], Split]:
    """Contexts may reach back from one part into those before it: each symbol is one series."""
    given = _chosen(recipe, [_candles(recipe, root, cache) for root in recipe.data.roots if root])
    parts = [given[0], [], given[-1]] if recipe.data.val_root is None else given
    split = split_by_parts(parts, horizon=recipe.horizon, unseen=recipe.split.get("unseen", ()))
    return pack(joined(parts), cache), split


def _candles(recipe: Recipe, folder: Path, cache: Path | None) -> Packed:
    data = recipe.data
    found = pack_folder(folder, cache, adjust=data.adjust, undo_splits=data.undo_splits).of_interval(data.interval)
    if not found:
        raise ValueError(f"{folder} has no {data.interval} candles")
    return found


def _chosen(recipe: Recipe, parts: Sequence[Packed]) -> Sequence[Packed]:
    """What each part has of the recipe's symbols; ValueError naming those that none has, and what there is."""
    if recipe.data.symbols is None:
        return parts
    wanted = {*recipe.data.symbols, *recipe.split.get("unseen", ())}
    there = set[str]().union(*(part.symbols for part in parts))
    if missing := wanted - there:
        known = sorted(there)
        shown = [*known[:_SHOWN], f"{len(known) - _SHOWN} more"] if len(known) > _SHOWN else known
        raise ValueError(f"there are no candles of {', '.join(sorted(missing))}; there is {', '.join(shown)}")
    return [part.of_symbols(wanted) for part in parts]


def _origins(recipe: Recipe, series: Sequence[Series], split: Split, part: Part, stride: int) -> Origins:
    origins = rolling_origins(series, split, part, stride=stride, min_context=recipe.context)
    if not len(origins):
        raise ValueError(_too_few(recipe, series, split, part))
    return origins


def _too_few(recipe: Recipe, series: Sequence[Series], split: Split, part: Part) -> str:
    """Which symbol comes closest to one origin, and what it lacks."""
    needed = f"{recipe.context} candles of context and {recipe.horizon} in the part"
    spans = [split.targets(item, part) for item in series]
    inside, rows, symbol = max((len(span), span.stop, item.symbol) for item, span in zip(series, spans, strict=True))
    if not inside:
        return f"the {part} part has no origin: it needs {needed}, and no symbol has any in it"
    return f"the {part} part has no origin: it needs {needed}, {symbol} has {rows - inside} before and {inside} in it"


# -- fitting ---------------------------------------------------------------------------------------


def _fit_toto(prepared: Prepared, run: RunPhase) -> Trained:
    recipe = prepared.recipe
    torch.manual_seed(recipe.seed)
    network = TotoNetwork(TotoConfig.from_published(recipe.network["network"]))
    if prepared.base and recipe.tune:
        load_strictly(network, prepared.base.version.weights, "Toto")
        open_up(network, "toto", recipe.tune)
    else:
        start_at_random_walk(network)
    network.to(prepared.device)
    length = recipe.context + network.config.patch_size
    objective = NextPatch(
        network=network,
        samplers={bars: _sampler(prepared, length * bars) for bars in recipe.objective.bars},
        transform=transform_of(recipe.network.get("log_scales")),
        context=recipe.context,
        rng=np.random.default_rng(recipe.seed),
        pointwise=LOSSES[recipe.objective.loss],
        holds_location=prepared.base is None,
        mirrored=recipe.objective.mirrored,
        simulated=recipe.objective.simulated,
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
        load_strictly(both, prepared.base.version.weights, "Kronos")
    else:
        for blocks in (tokenizer.encoder, tokenizer.decoder):
            damp_residuals(blocks, 0.1)
    tokenizer.to(prepared.device)
    made_up: Any = {"mirrored": recipe.objective.mirrored, "simulated": recipe.objective.simulated}
    runs = {}
    if "tokenizer" in recipe.phases:
        reconstruction = TokenizerReconstruction(
            tokenizer, sampler, recipe.context, rng, **made_up, weights=recipe.objective.weights
        )
        runs["tokenizer"] = run("tokenizer", reconstruction)
    if recipe.tune:
        open_up(predictor, "kronos", recipe.tune)
    else:
        start_with_bits(predictor)
    predictor.to(prepared.device)
    next_token = NextToken(predictor, tokenizer, sampler, recipe.context, rng, **made_up)
    runs["predictor"] = run("predictor", next_token, lambda: merged(both))
    return Trained(merged(both), runs, adapter_of(both))


_FITTERS: Mapping[str, Callable[[Prepared, RunPhase], Trained]] = {
    "toto": _fit_toto,
    "kronos": _fit_kronos,
}


def _sampler(prepared: Prepared, length: int) -> WindowSampler:
    return WindowSampler(prepared.series, prepared.split, length, calendar=prepared.recipe.data.calendar)


# -- judging and publishing ------------------------------------------------------------------------


def score(forecaster: Forecaster, prepared: Prepared, part: Part, track: Track, who: str) -> Scores:
    """Rolling-origin scores of the recipe's evaluation on one part of its split."""
    return _score(forecaster, prepared, prepared.origins[part], partial(track, f"{who} evaluate {part}"))


def _score(forecaster: Forecaster, prepared: Prepared, origins: Origins, report: Report) -> Scores:
    judged = 0

    def advance(rows: int) -> None:
        nonlocal judged
        judged += rows
        report(judged / len(origins), f"{judged} origins")

    return evaluate_as_served(forecaster, prepared, origins, prepared.recipe.evaluate.samples, advance)


def _judge(prepared: Prepared, published: Callable[[], Weights]) -> Judgement:
    recipe = prepared.recipe
    assert recipe.select is not None
    assert prepared.choosing is not None
    forecaster = build_forecaster(recipe.family, recipe.network, published(), prepared.device)
    scores = evaluate_as_served(forecaster, prepared, prepared.choosing, recipe.select.samples)
    relative = np.abs(scores.errors).mean() / np.abs(scores.naive_errors).mean()
    return Judgement(crps=float(scores.crps.mean()), skill_vs_naive=float(1 - relative))


def evaluate_as_served(
    forecaster: Forecaster,
    prepared: Prepared,
    origins: Origins,
    samples: int,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """By the recipe's serving defaults; `samples` and the whole context where it has none for these."""
    recipe, serving = prepared.recipe, _serving(prepared.recipe)
    return evaluate(
        forecaster,
        prepared.series,
        origins,
        sampling=served_sampling({"samples": samples, **serving}),
        lookback=serving.get("lookback", recipe.context),
        aggregate=served_aggregate(serving),
        calendar=recipe.data.calendar,
        batch_rows=recipe.evaluate.batch_rows,
        progress=progress,
    )


def judge_and_publish(prepared: Prepared, trained: Trained, store: ModelStore, track: Track) -> Manifest:
    """Store weights, config, evaluations and the drift baseline as one version."""
    recipe, base = prepared.recipe, prepared.base
    forecaster = build_forecaster(recipe.family, recipe.network, trained.weights, prepared.device)
    scores = {part: score(forecaster, prepared, part, track, recipe.name) for part in prepared.origins}
    beside = {part: score(base.forecaster, prepared, part, track, "base") for part in scores} if base else {}
    fields: dict[str, Any] = {
        "model": prepared.model,
        "symbol": prepared.symbol,
        "family": recipe.family,
        "origin": _origin(prepared),
        "limits": asdict(forecaster.limits),
        "serving": _serving(recipe),
        "training": _record(prepared, trained),
        "selected_on": prepared.selected_on,
        "evaluations": tuple(summary(own, beside.get(part)) for part, own in scores.items()),
        "baselines": drift_baselines(forecaster, prepared, scores["test"], track),
        "canary": canary_of(forecaster),
        **provenance(),
    }
    return store.put(fields, recipe.network, trained.weights, trained.adapter, windows(scores.values()))


def drift_baselines(forecaster: Forecaster, prepared: Prepared, test: Scores, track: Track) -> tuple[Baseline, ...]:
    """Of the test's origins; where these make too few blocks, of closer ones, and of val's if those chose nothing."""
    recipe, found = prepared.recipe, baselines(test)
    blocks = {each.group: each.n_blocks for each in found if each.symbol == "*"}
    if all(blocks.get(group, 0) >= _BASELINE_BLOCKS for group in range(scoring.group_of(recipe.horizon) + 1)):
        return found
    parts: tuple[Part, ...] = ("test",) if prepared.chose_by_val else ("val", "test")
    pairs = chain.from_iterable(
        rolling_origins(
            prepared.series,
            prepared.split,
            part,
            stride=min(recipe.evaluate.stride, recipe.evaluate.baseline_stride),
            min_context=recipe.context,
        ).pairs
        for part in parts
    )
    origins = replace(prepared.origins["test"], pairs=tuple(pairs))
    if origins == prepared.origins["test"]:
        return found
    return baselines(_score(forecaster, prepared, origins, partial(track, f"{recipe.name} baseline")))


def _origin(prepared: Prepared) -> Origin:
    """Weights that others' weights were tuned to keep their licence."""
    source = f"{prepared.recipe.name}.toml"
    if prepared.base is None:
        return Origin(kind="trained", source=source, licence="Apache-2.0")
    base = prepared.base.version.manifest
    return Origin(kind="trained", source=source, revision=base.version, licence=base.origin.licence)


def _serving(recipe: Recipe) -> dict[str, Any]:
    return recipe.serving.model_dump(exclude_none=True)


def _record(prepared: Prepared, trained: Trained) -> TrainingRecord:
    recipe, split = prepared.recipe, prepared.split
    spans = [item.timestamps[split.targets(item, "train")] for item in prepared.series]
    fitted = [(item.symbol, span) for item, span in zip(prepared.series, spans, strict=True) if len(span)]
    symbols = {symbol for symbol, _ in fitted}
    start, end = day(min(int(span[0]) for _, span in fitted)), day(max(int(span[-1]) for _, span in fitted))
    earlier = prepared.base.version.manifest.training if prepared.base else None
    if earlier:  # what the base has seen, so have its children
        symbols, start, end = symbols.union(earlier.symbols), min(start, earlier.start), max(end, earlier.end)
    return TrainingRecord(
        recipe=recipe.model_dump(mode="json"),
        data_digest=prepared.data_digest,
        symbols=tuple(sorted(symbols)),
        interval=recipe.data.interval,
        start=start,
        end=end,
        notes=tuple(f"{phase}: {note}" for phase, run in trained.runs.items() for note in run.notes),
        losses={phase: run.loss for phase, run in trained.runs.items()},
        steps=sum(run.steps for run in trained.runs.values()),
        seconds=round(sum(run.seconds for run in trained.runs.values()), 1),
        seed=recipe.seed,
    )


def verdict(evaluation: Evaluation) -> str:
    """One line: the skill that was reached, against naive, against the walk and against what was tuned."""
    skill, ratio = evaluation.metrics["skill_vs_naive"], evaluation.metrics["crps_ratio_walk"]
    coverage = evaluation.metrics["coverage_80"].value
    base = evaluation.metrics.get("crps_ratio_base")
    tuned = f" and {base.value:.3f} x its base's{_interval(base.low, base.high)}" if base else ""
    walk = f"{ratio.value:.3f} x the random walk's{_interval(ratio.low, ratio.high)}"
    return (
        f"{evaluation.windows}: skill vs naive {skill.value:+.3f}{_interval(skill.low, skill.high)}, CRPS"
        f" {walk}{tuned}, 80 % band covers {coverage:.0%}"
    )


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def provenance() -> dict[str, str | None]:
    """When a version is made, and from which commit."""
    return {"created_at": datetime.now(UTC).isoformat(timespec="seconds"), "code_revision": _code_revision()}


def _code_revision() -> str | None:
    """Of the checkout that trains, if it is one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
