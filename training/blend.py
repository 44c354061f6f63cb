"""An ensemble, a straight line: members, weights from the val part, scores on windows that these never saw, version."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model_store.canary import canary_of
from model_store.manifest import Manifest, Metric, Origin
from model_store.store import LoadedVersion, ModelStore
from models import scoring
from models.candles import Floats
from models.ensemble import ENSEMBLE, EnsembleForecaster, Member, Weights, average, member_of, shares_by_step
from models.forecaster import DEFAULT_HORIZON
from training.candle_files import digest
from training.compare import counted
from training.evaluate import baselines, side_by_side, summary, windows
from training.outcomes import Outcomes
from training.packed import pack_folder
from training.report import Entry
from training.scores import LEVELS, Scores
from training.train import Track, provenance, refuse_leak, stand_as_candidate
from training.windows import Part, day, rolling_origins, split_from_recipe

EQUAL_WEIGHTS: Final = "equal weights"
_LEAST_NOISE: Final = 1e-6  # of the loss: members that never differ share equally, whatever rounding says
_GOLDEN: Final = (math.sqrt(5) - 1) / 2
_NARROWED: Final = 20  # times: to less than 1e-4 of a weight
_SWEEPS: Final = 20
_SETTLED: Final = 1e-4


@dataclass(frozen=True)
class Blended:
    """A published ensemble, beside its members and beside equal weights on windows that its weights never saw."""

    manifest: Manifest
    weights: Weights
    entries: Sequence[Entry]
    notes: Sequence[str]  # whether it is better than its best member, and what there is to doubt


def blend(
    store: ModelStore,
    references: Sequence[str],
    folder: Path,
    *,
    name: str,
    stride: int,
    val_from: date,
    test_from: date,
    unseen: Sequence[str],
    horizon: int | None = None,
    track: Track | None = None,
) -> Blended:
    """Learn weights on the val part of a folder's candles, score the ensemble on the others, and store it.

    All are forecast from identical origins, as the service would ask them. The version becomes `candidate`, and
    `production` where there is none. ValueError if a member was trained on what is held out, or is an ensemble itself.
    """
    members = _members([store.load(reference) for reference in references])
    steps = horizon or min(_usual_horizon(version) for version in members.values())
    series = pack_folder(folder)
    split = split_from_recipe({"val_from": val_from, "test_from": test_from, "unseen": unseen}, series, steps)
    for version in members.values():
        refuse_leak(version.manifest, split)
    asked = {exact: member_of(version.build(), version.manifest.serving) for exact, version in members.items()}
    context = max(member.lookback for member in asked.values())
    alone = {
        exact: (_alone(member, steps), member.lookback, member.sampling, "median") for exact, member in asked.items()
    }
    parts: tuple[Part, ...] = ("val", "test", "unseen") if split.unseen else ("val", "test")
    scores: dict[Part, Mapping[str, Scores]] = {}
    for part in parts:
        origins = rolling_origins(series, split, part, stride=stride, min_context=context)
        scores[part] = side_by_side(alone, series, origins, progress=track and counted(track, origins))
    validated = [*scores.pop("val").values()]
    weights, blocks = learn(validated)
    learnt = _origin_of_weights(validated[0].outcomes, blocks) | {"data_digest": digest(series)}
    config = {"members": [*members], "weights": [[*row] for row in weights], "max_horizon": steps, "learnt": learnt}
    forecaster = EnsembleForecaster.from_config(config, [*asked.values()])
    found = {part: blended([*each.values()], weights) for part, each in scores.items()}
    manifest = _publish(store, name, config, forecaster, members.values(), found, scores)
    exact = f"{manifest.model}@{manifest.version}"
    return Blended(manifest, weights, _entries(exact, found, scores), [*_verdicts(manifest, scores), *_doubts(members)])


def _members(versions: Sequence[LoadedVersion]) -> dict[str, LoadedVersion]:
    found = {f"{each.manifest.model}@{each.manifest.version}": each for each in versions}
    if len(found) < 2 or len(found) < len(versions):
        raise ValueError("an ensemble blends two different versions or more")
    if nested := [exact for exact, each in found.items() if each.manifest.family == ENSEMBLE]:
        raise ValueError(f"{nested[0]} is an ensemble itself: name its members")
    return found


def _usual_horizon(version: LoadedVersion) -> int:
    manifest = version.manifest
    usual = manifest.serving.get("horizon", DEFAULT_HORIZON[manifest.family])
    return min(int(usual), manifest.limits.max_horizon)


def _origin_of_weights(facts: Outcomes, blocks: Sequence[int]) -> dict[str, Any]:
    """What they were learnt from; `blocks` by group of horizons."""
    return {
        "from": day(int(facts.target_times.min())),
        "until": day(int(facts.target_times.max())),
        "interval": facts.interval,
        "symbols": sorted(set(facts.symbols.tolist())),
        "windows": len(facts.symbols),
        "blocks": [*blocks],
    }


def _alone(member: Member, steps: int) -> EnsembleForecaster:
    """One member as the ensemble asks it: what is learnt from and compared is what would be served."""
    return EnsembleForecaster([member], ((1.0,),) * (scoring.group_of(steps) + 1), steps)


# -- weights ---------------------------------------------------------------------------------------


def learn(scores: Sequence[Scores]) -> tuple[Weights, tuple[int, ...]]:
    """Weights for each group of horizons by the CRPS of the blend, shrunk to equal ones; and how many blocks of time
    each group's are learnt from. The scores are of the same windows."""
    groups = range(scoring.group_of(scores[0].outcomes.horizon) + 1)
    found = [_learn_group(scores, group) for group in groups]
    return tuple(weights for weights, _ in found), tuple(blocks for _, blocks in found)


def _learn_group(scores: Sequence[Scores], group: int) -> tuple[tuple[float, ...], int]:
    """The weights w that minimise CRPS(w) / CRPS(equal) + s · M / (M - 1) · |w - equal|² over the simplex.

    It is the egalitarian ridge of Diebold and Shin (2019). Its strength s is the standard error of the difference
    between two members' relative CRPS, from means over blocks of time whose forecasts share no target: the number of
    blocks is that of the windows which are effectively independent. All weight on one member costs s. So where nothing
    is gained by diversity, of two members one that is better by 2 standard errors gets three quarters, by 4 everything;
    what differs by chance alone stays near a half. With fewer than four blocks the weights are equal.
    """
    facts, count = scores[0].outcomes, len(scores)
    steps = scoring.steps_of(group, facts.horizon)
    equal = np.full(count, 1 / count)
    errors = np.stack([facts.moves[:, None, steps] - each.quantiles[:, 1:-1, steps] for each in scores])
    levels = np.reshape(LEVELS, (-1, 1))

    def crps(weights: Floats) -> Floats:
        """`[N]` of the blend: quantiles are averaged, so errors are."""
        error = average(weights, [*errors])
        return np.asarray(2 * (levels * error - np.minimum(error, 0)).mean(axis=(1, 2)))

    unit = float(crps(equal).mean())
    alone = np.stack([crps(one) for one in np.eye(count)])
    blocks = _block_means(alone, facts.positions // scoring.block_length(group))
    if unit == 0 or blocks.shape[1] < scoring.MIN_BLOCKS:
        return tuple(equal.tolist()), blocks.shape[1]
    noise = max(_noise(blocks / unit), _LEAST_NOISE) * count / (count - 1)

    def objective(weights: Floats) -> float:
        return float(crps(weights).mean() / unit + noise * ((weights - equal) ** 2).sum())

    return tuple(_minimised(objective, equal).tolist()), blocks.shape[1]


def _block_means(values: Floats, block: NDArray[np.int64]) -> Floats:
    """`[M, B]` means of `[M, N]` over the windows of each block."""
    places = np.unique(block, return_inverse=True)[1]
    return np.stack([np.bincount(places, row) / np.bincount(places) for row in values])


def _noise(means: Floats) -> float:
    """Root mean square, over pairs of members, of the standard error of their difference; `[M, B]`."""
    apart = means - means.mean(axis=0)
    return math.sqrt(2 / (len(means) - 1) * float(apart.var(axis=1, ddof=1).sum()) / means.shape[1])


def _minimised(objective: Callable[[Floats], float], start: Floats) -> Floats:
    """Where a convex function of shares is least: two members at a time share anew what they have, until all stay."""
    weights = start
    for _ in range(_SWEEPS):
        before = weights
        for one, other in combinations(range(len(start)), 2):
            weights = _shared_anew(objective, weights, one, other)
        if np.abs(weights - before).max() < _SETTLED:
            break
    return np.asarray(weights / weights.sum())


def _shared_anew(objective: Callable[[Floats], float], weights: Floats, one: int, other: int) -> Floats:
    def shared(share: float) -> Floats:
        changed = weights.copy()
        changed[one], changed[other] = share, total - share
        return changed

    total = float(weights[one] + weights[other])
    low, high = 0.0, total
    left, right = total - _GOLDEN * total, _GOLDEN * total
    at_left, at_right = objective(shared(left)), objective(shared(right))
    for _ in range(_NARROWED):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = objective(shared(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = objective(shared(right))
    return min(map(shared, (0.0, total, (low + high) / 2)), key=objective)


def blended(scores: Sequence[Scores], weights: Weights) -> Scores:
    """What the ensemble of these weights scores on the same windows: its arithmetic on the members' forecasts."""
    facts = scores[0].outcomes
    shares = shares_by_step(weights, facts.horizon)
    quantiles = average(shares[:, None, None], [each.quantiles for each in scores])
    point = np.exp(average(shares[:, None], [np.log(each.point) for each in scores]))
    crps = scoring.crps_quantiles(facts.moves, np.moveaxis(quantiles[:, 1:-1], 1, 0), LEVELS)
    return Scores(facts, "quantiles", None, np.asarray(point), quantiles, crps)


# -- version ---------------------------------------------------------------------------------------


def _publish(
    store: ModelStore,
    name: str,
    config: Mapping[str, Any],
    forecaster: EnsembleForecaster,
    members: Collection[LoadedVersion],
    found: Mapping[Part, Scores],
    beside: Mapping[Part, Mapping[str, Scores]],
) -> Manifest:
    licences = sorted({each.manifest.origin.licence for each in members if each.manifest.origin.licence})
    fields: dict[str, Any] = {
        "model": name,
        "family": ENSEMBLE,
        "origin": Origin(
            kind="trained", source=f"blend of {', '.join(config['members'])}", licence=" AND ".join(licences) or None
        ),
        "limits": asdict(forecaster.limits),
        "evaluations": tuple(summary(own, beside[part][_best(beside[part])]) for part, own in found.items()),
        "baselines": baselines(found["test"]),
        "canary": canary_of(forecaster),
        **provenance(),
    }
    manifest = store.put(fields, config, {}, scores=windows(found.values()))
    stand_as_candidate(manifest, store)
    return manifest


def _best(scores: Mapping[str, Scores]) -> str:
    """The member with the least CRPS on these very windows: a rival chosen in hindsight."""
    return min(scores, key=lambda exact: float(scores[exact].crps.mean()))


def _entries(exact: str, found: Mapping[Part, Scores], beside: Mapping[Part, Mapping[str, Scores]]) -> Sequence[Entry]:
    entries: list[Entry] = []
    for part, own in found.items():
        members = beside[part]
        equal = ((1 / len(members),) * len(members),) * (scoring.group_of(own.outcomes.horizon) + 1)
        rivals = {**members, EQUAL_WEIGHTS: blended([*members.values()], equal)}
        entries += [(name, summary(each)) for name, each in {exact: own, **rivals}.items()]
    return entries


def _verdicts(manifest: Manifest, beside: Mapping[Part, Mapping[str, Scores]]) -> Sequence[str]:
    return [
        f"{each.windows}: {_verdict(each.metrics['crps_ratio_base'], _best(beside[part]))}"
        for part, each in zip(beside, manifest.evaluations, strict=True)
    ]


def _doubts(members: Mapping[str, LoadedVersion]) -> Sequence[str]:
    chosen = [exact for exact, each in members.items() if each.manifest.chose_by_val]
    return [f"{exact} was chosen by a val part itself, which flatters it in the weights" for exact in chosen]


def _verdict(ratio: Metric, best: str) -> str:
    """Of the blend beside its best member, by the paired interval of their CRPS."""
    told = f"{best}, its best member there: CRPS {ratio.value:.3f} x that one's"
    if ratio.low is None or ratio.high is None:
        return f"too few windows to tell it from {told}"
    relation = "better than" if ratio.high < 1 else "worse than" if ratio.low > 1 else "statistically equal to"
    return f"{relation} {told} [{ratio.low:.3f}, {ratio.high:.3f}]"
