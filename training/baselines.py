"""What a model must beat: forecasts that need no training, each a Gaussian of ln(close / last close)."""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import NormalDist
from typing import Final

import numpy as np

from models import scoring
from models.candles import CLOSE, DAY_MS, OPEN, Floats, Millis
from models.forecaster import Forecast, Forecaster, ForecastInput, checked
from models.naive import NaiveForecaster, naive_rows

LOOKBACK: Final = 512  # candles that a baseline sees, whatever the models beside it see

Moments = Callable[[Floats, ForecastInput], tuple[Floats, Floats]]  # log-closes [T] -> mean and sigma [H]

_NORMAL: Final = NormalDist()
_BAND: Final = 80  # percent


class GaussianForecaster(NaiveForecaster):
    """ln(close[h] / last close) ~ N(mean[h], sigma[h]²); open, high and low like close, volume like the last."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def _forecast(self, item: ForecastInput) -> Forecast:
        mean, sigma = self._moments(np.log(item.candles[:, CLOSE]), item)
        point = naive_rows(item.candles, item.horizon)
        point[:, OPEN : CLOSE + 1] *= np.exp(mean)[:, None]
        closes = item.last_close * np.exp(mean + scoring.walk_quantiles(sigma, item.all_levels))
        rising = [_NORMAL.cdf(m / s) if s > 0 else (np.sign(m) + 1) / 2 for m, s in zip(mean, sigma, strict=True)]
        quantiles = {"high": closes, "low": closes, "close": closes}
        return checked(Forecast(point, item.all_levels, quantiles, prob_up=np.array(rising)))


def ewma_walk(closes: Floats, item: ForecastInput) -> tuple[Floats, Floats]:
    """The zero-drift random walk with EWMA(0.94) volatility: the walk of every table."""
    volatility = scoring.ewma_volatility(np.diff(closes), scoring.WALK_DECAY)[-1]
    return np.zeros(item.horizon), scoring.walk_sigma(volatility, item.horizon)


def drift(closes: Floats, item: ForecastInput) -> tuple[Floats, Floats]:
    """The random walk with the mean and the spread of all returns: Hyndman and Athanasopoulos, FPP3, 5.2 and 5.5."""
    returns, steps = np.diff(closes), np.arange(1, item.horizon + 1)
    return steps * returns.mean(), returns.std() * np.sqrt(steps * (1 + steps / len(returns)))


def seasonal_naive(closes: Floats, item: ForecastInput) -> tuple[Floats, Floats]:
    """The last season once more, in the same book's terms; ValueError where the context is no longer than a season."""
    season = season_length(item.timestamps)
    if not season or season >= len(closes):
        raise ValueError(f"{len(closes)} candles hold no season: leave the seasonal baseline out")
    ahead = np.arange(item.horizon)
    changes = closes[season:] - closes[:-season]
    mean = closes[ahead % season - season] - closes[-1]
    return mean, np.sqrt(np.mean(changes**2) * (ahead // season + 1))


def season_length(timestamps: Millis) -> int:
    """Candles in a usual day, or in a week where they last a day or more; 0 where there is no whole one."""
    step = np.median(np.diff(timestamps))
    span = DAY_MS if step < DAY_MS else 7 * DAY_MS
    counts = np.searchsorted(timestamps, timestamps + span) - np.arange(len(timestamps))
    whole = counts[timestamps + span <= timestamps[-1] + step]
    return int(np.median(whole)) if len(whole) else 0


def statistical(method: str, closes: Floats, item: ForecastInput) -> tuple[Floats, Floats]:
    """A method of statsforecast, without season, on log-closes; its 80 % band is read as a Gaussian's."""
    from statsforecast import models

    found = getattr(models, method)(season_length=1).forecast(y=closes, h=item.horizon, level=[_BAND])
    width = found[f"hi-{_BAND}"] - found[f"lo-{_BAND}"]
    return found["mean"] - closes[-1], width / (2 * _NORMAL.inv_cdf(0.5 + _BAND / 200))


_MOMENTS: Final[Mapping[str, Moments]] = {
    "seasonal": seasonal_naive,
    "drift": drift,
    "ewma": ewma_walk,
    "autoets": partial(statistical, "AutoETS"),
    "autotheta": partial(statistical, "AutoTheta"),
}
BASELINES: Final = ("naive", *_MOMENTS)


def baseline(name: str) -> Forecaster:
    """The baseline of a name; ValueError with their names if there is none, or a package is missing."""
    if name not in BASELINES:
        raise ValueError(f"no baseline is called {name!r}: there are {', '.join(BASELINES)}")
    if name.startswith("auto"):
        _require_statsforecast(name)
    return NaiveForecaster() if name == "naive" else GaussianForecaster(_MOMENTS[name])


def _require_statsforecast(name: str) -> None:
    try:
        import statsforecast  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{name} needs statsforecast: pip install 'candlecast[stats]'") from error
