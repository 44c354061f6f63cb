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


def _trimmed(paths: Floats, low: float, high: float) -> Floats:
    """Mean of the sorted paths without the lowest `low` and highest `high` share."""
    count = len(paths)
    first, last = int(count * low), count - int(count * high)
    return np.sort(paths, axis=0)[first:last].mean(axis=0)


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


def _at(paths: Floats, level: float) -> Floats:
    return path_quantiles(paths, (level,))[0]


_SPECS: Final[tuple[tuple[str, Callable[..., Aggregate]], ...]] = (
    ("mean", lambda: lambda p: p.mean(axis=0)),
    ("median", lambda: lambda p: np.median(p, axis=0)),
    (r"p(\d+)", lambda q: lambda p, q=_level(f"{int(q) / 100}"): _at(p, q)),
    (rf"quantile_{_NUMBER}", lambda q: lambda p, q=_level(q): _at(p, q)),
    (rf"trimmed_mean_{_NUMBER}", lambda x: lambda p, x=_share(x): _trimmed(p, x, x)),
    (rf"lower_trimmed_mean_{_NUMBER}", lambda x: lambda p, x=_share(x): _trimmed(p, x, 0)),
    (rf"upper_trimmed_mean_{_NUMBER}", lambda x: lambda p, x=_share(x): _trimmed(p, 0, x)),
    (rf"mean_plus_std_{_NUMBER}", lambda k: lambda p, k=float(k): p.mean(0) + k * p.std(0)),
    (rf"mean_minus_std_{_NUMBER}", lambda k: lambda p, k=float(k): p.mean(0) - k * p.std(0)),
    (
        rf"mean_quantile_mix_{_NUMBER}_{_NUMBER}",
        lambda q, w: lambda p, q=_level(q), w=float(w): w * p.mean(0) + (1 - w) * _at(p, q),
    ),
    (
        rf"quantile_plus_std_{_NUMBER}_{_NUMBER}",
        lambda q, k: lambda p, q=_level(q), k=float(k): _at(p, q) + k * p.std(0),
    ),
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
