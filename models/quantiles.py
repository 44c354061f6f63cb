"""Paths to quantiles and points: plotting positions, aggregation specs."""

import re
from collections.abc import Callable
from typing import Final

import numpy as np

from models.candles import Floats

Aggregate = Callable[[Floats], Floats]

_NUMBER: Final = r"(\d+(?:\.\d+)?)"


def path_quantiles(paths: Floats, levels: tuple[float, ...]) -> Floats:
    """Quantiles `[Q, ...]` of `paths` `[S, ...]` at Weibull plotting positions i / (S + 1).

    Of S exchangeable draws the i-th smallest leaves i / (S + 1) of the next draw's probability below it, so
    an 80 % band from 32 paths covers 80 %; numpy's default positions make it cover 75 %.
    """
    return np.quantile(paths, levels, axis=0, method="weibull")


def unreachable_levels(levels: tuple[float, ...], samples: int) -> list[float]:
    """The levels that `samples` paths cannot resolve: outside [1 / (S + 1), S / (S + 1)]."""
    edge = 1 / (samples + 1) - 1e-12
    return [level for level in levels if not edge <= level <= 1 - edge]


def _level(text: str) -> float:
    level = float(text)
    if not 0 < level < 1:
        raise ValueError(f"quantile level {text} is not between 0 and 1")
    return level


def _share(text: str) -> float:
    percent = float(text)
    if not 0 <= percent < 50:
        raise ValueError(f"cannot trim {text} %: give a percentage below 50")
    return percent / 100


def _quantile(level: float) -> Aggregate:
    return lambda paths: path_quantiles(paths, (level,))[0]


def _trimmed(low: float, high: float) -> Aggregate:
    """Mean of the sorted paths without the lowest `low` and highest `high` share."""

    def mean(paths: Floats) -> Floats:
        count = len(paths)
        first, last = (int(count * share + 1e-9) for share in (low, high))  # 0.29 * 100 is 28.999...
        kept: Floats = np.sort(paths, axis=0)[first : count - last].mean(axis=0)
        return kept

    return mean


def _factor(text: str) -> float:
    factor = float(text)
    if factor > 10:
        raise ValueError(f"{text} standard deviations are more than 10")
    return factor


def _weight(text: str) -> float:
    weight = float(text)
    if weight > 1:
        raise ValueError(f"the weight {text} of the mean is above 1")
    return weight


def _plus_std(centre: Aggregate, factor: float) -> Aggregate:
    return lambda paths: centre(paths) + factor * paths.std(axis=0)


def _mix(level: float, weight: float) -> Aggregate:
    quantile = _quantile(level)
    return lambda paths: weight * _mean(paths) + (1 - weight) * quantile(paths)


def _mean(paths: Floats) -> Floats:
    mean: Floats = paths.mean(axis=0)
    return mean


def _median(paths: Floats) -> Floats:
    return np.asarray(np.median(paths, axis=0))


_SPECS: Final[tuple[tuple[str, Callable[..., Aggregate]], ...]] = (
    ("mean", lambda: _mean),
    ("median", lambda: _median),
    (r"p(\d+)", lambda q: _quantile(_level(str(int(q) / 100)))),
    (rf"quantile_{_NUMBER}", lambda q: _quantile(_level(q))),
    (rf"trimmed_mean_{_NUMBER}", lambda x: _trimmed(_share(x), _share(x))),
    (rf"lower_trimmed_mean_{_NUMBER}", lambda x: _trimmed(_share(x), 0)),
    (rf"upper_trimmed_mean_{_NUMBER}", lambda x: _trimmed(0, _share(x))),
    (rf"mean_plus_std_{_NUMBER}", lambda k: _plus_std(_mean, _factor(k))),
    (rf"mean_minus_std_{_NUMBER}", lambda k: _plus_std(_mean, -_factor(k))),
    (rf"mean_quantile_mix_{_NUMBER}_{_NUMBER}", lambda q, w: _mix(_level(q), _weight(w))),
    (rf"quantile_plus_std_{_NUMBER}_{_NUMBER}", lambda q, k: _plus_std(_quantile(_level(q)), _factor(k))),
)


def parse_aggregate(spec: str) -> Aggregate:
    """The function `[S, ...] -> [...]` that `spec` names; ValueError with the accepted forms otherwise.

    Percentages are always percentages (`trimmed_mean_1` trims 1 % off each end), levels always levels.
    """
    for pattern, build in _SPECS:
        match = re.fullmatch(pattern, spec)
        if match:
            return build(*match.groups())
    raise ValueError(
        f"unknown aggregate {spec!r}: use mean, median, pNN, quantile_Q, [lower_|upper_]trimmed_mean_PERCENT,"
        " mean_plus_std_K, mean_minus_std_K, mean_quantile_mix_Q_W or quantile_plus_std_Q_K"
    )
