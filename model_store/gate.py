"""What a version must show before it serves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store.canary import check_canary
from model_store.files import StoreError, VerificationFailed
from model_store.manifest import Canary, Evaluation, Manifest, Metric
from models.candles import Floats
from models.forecaster import Forecaster
from models.scoring import block_bootstrap

_METRIC: Final = "skill_vs_naive"
_GAIN: Final = "skill_vs_base"  # whose interval is of both on the same windows
_COLUMNS: Final = ("time", "symbol", "position", "error", "naive")


class PromotionRefused(StoreError):
    """The gate said no; `--force REASON` overrides what it says about scores."""


def refuse_unlike(manifest: Manifest, canary: Canary, build: Callable[[], Forecaster]) -> str:
    """PromotionRefused unless the version forecasts here what it did where it was stored; a note where it does."""
    try:
        check_canary(canary, build())
    except (ValueError, VerificationFailed) as error:
        raise PromotionRefused(f"{manifest.model}@{manifest.version} does not forecast as it did: {error}") from error
    return "it forecasts as it did where it was stored"


def window_scores(
    part: str,
    *,
    times: NDArray[np.int64],
    symbols: NDArray[np.int64],
    positions: NDArray[np.int64],
    errors: Floats,
    naive_errors: Floats,
) -> dict[str, Tensor]:
    """What a version keeps of an evaluation's N windows, for comparing it with another, window by window.

    `times` are the origins in UTC ms, `symbols` places among the evaluation's, `positions` those of the origins in
    the grid of candle times; errors are log-returns `[N, H]`.
    """
    columns = {
        "time": times.astype(np.int64),
        "symbol": symbols.astype(np.int32),
        "position": positions.astype(np.int32),
        "error": np.abs(errors).mean(axis=1).astype(np.float32),
        "naive": np.abs(naive_errors).mean(axis=1).astype(np.float32),
    }
    return {f"{part}.{name}": torch.from_numpy(values) for name, values in columns.items()}


@dataclass(frozen=True)
class Judged:
    """A version's manifest, and what it kept of its windows."""

    manifest: Manifest
    windows: Mapping[str, Tensor]

    def columns(self, part: str, symbol: str | None) -> dict[str, NDArray[Any]] | None:
        """By name, in the order of time and symbol, of `symbol` alone if one is given; None if they were not kept."""
        evaluation = self.manifest.evaluation(part)
        if evaluation is None or f"{part}.time" not in self.windows:
            return None
        found = {name: self.windows[f"{part}.{name}"].numpy() for name in _COLUMNS}
        found["symbol"] = np.array(evaluation.symbols)[found["symbol"]]
        rows = np.lexsort((found["symbol"], found["time"]))
        rows = rows if symbol is None else rows[found["symbol"][rows] == symbol]
        return {name: values[rows] for name, values in found.items()}


def refuse_worse(new: Judged, current: Judged, symbol: str | None = None) -> list[str]:
    """Notes, or PromotionRefused unless, wherever the current version's skill is known, the new one's on the very same
    windows is known too and may be as high: by the interval of their difference over these windows, those of `symbol`
    alone if one is given, or, where the versions did not keep them, by its own. What was tuned from the current version
    brings the comparison along, on the windows that it was itself judged by."""
    tuned = _beside_base(new.manifest, current.manifest)
    notes = [_judge_tuned(skill, windows) for windows, skill in tuned.items()]
    for old in current.manifest.evaluations:
        if _METRIC not in old.metrics or (symbol and symbol not in old.symbols):
            continue
        lead = paired_lead(new, current, old, symbol)
        if lead is not None:
            notes.append(_judge_paired(*lead, old.windows))
        elif not tuned:
            notes.append(_judge(_same_test_set(new.manifest, old, current.manifest), old))
    return notes


def _beside_base(new: Manifest, current: Manifest) -> dict[str, Metric]:
    """By windows, what the new version gained on the current one where it was tuned from that."""
    if new.origin.revision != current.version:
        return {}
    return {fresh.windows: fresh.metrics[_GAIN] for fresh in new.evaluations if _GAIN in fresh.metrics}


def _judge_tuned(gain: Metric, windows: str) -> str:
    at_most = gain.value if gain.high is None else gain.high
    told = f"{_GAIN} on the {windows} windows is {gain.value:+.4f} (at most {at_most:+.4f})"
    if at_most < 0:
        raise PromotionRefused(f"{told}: give --force REASON to promote it all the same")
    return told


def paired_lead(
    new: Judged, current: Judged, old: Evaluation, symbol: str | None = None
) -> tuple[float, float, float] | None:
    """The new version's skill minus the current one's, with its 95 % interval from blocks of one horizon.

    None unless both kept the same windows, of the very same candles, and they make four blocks or more.
    """
    ours, theirs = new.columns(old.windows, symbol), current.columns(old.windows, symbol)
    if ours is None or theirs is None or not len(ours["time"]):
        return None
    if not all(np.array_equal(ours[name], theirs[name]) for name in ("time", "symbol", "naive")):
        return None
    leads, naive = (values.astype(np.float64) for values in (theirs["error"] - ours["error"], ours["naive"]))
    places = ours["position"] - ours["position"].min()
    by_time = np.bincount(places, leads).astype(np.float64), np.bincount(places, naive).astype(np.float64)
    interval = block_bootstrap(*by_time, block=old.horizon, seed=0)
    return None if interval is None else (float(leads.sum() / naive.sum()), *interval)


def _judge_paired(lead: float, low: float, high: float, windows: str) -> str:
    told = f"{_METRIC} on the {windows} windows is {lead:+.4f} [{low:+.4f}, {high:+.4f}] beside the current version's"
    if high < 0:
        raise PromotionRefused(f"{told}: give --force REASON to promote it all the same")
    return told


def _judge(fresh: Evaluation, old: Evaluation) -> str:
    before, after = old.metrics[_METRIC], fresh.metrics[_METRIC]
    at_most = after.value if after.high is None else after.high
    told = (
        f"{_METRIC} on the {old.windows} windows is {after.value:+.4f} (at most {at_most:+.4f}),"
        f" the current version's is {before.value:+.4f}"
    )
    if at_most < before.value:
        raise PromotionRefused(f"{told}: give --force REASON to promote it all the same")
    return told


def _same_test_set(new: Manifest, old: Evaluation, current: Manifest) -> Evaluation:
    scored = [fresh for fresh in new.evaluations if fresh.windows == old.windows and _METRIC in fresh.metrics]
    same = [fresh for fresh in scored if _test_set(fresh) == _test_set(old)]
    if not same:
        other = "was scored on another test set than" if scored else f"has no {_METRIC} beside"
        raise PromotionRefused(
            f"{new.model}@{new.version} {other} the current version {current.version} on the"
            f" {old.windows} windows: evaluate it on the same, or give --force REASON"
        )
    return same[0]


def _test_set(evaluation: Evaluation) -> tuple[object, ...]:
    """What two evaluations must share for their scores to be comparable."""
    e = evaluation
    return e.windows, e.start, e.end, e.interval, e.horizon, e.origins, sorted(e.symbols)
