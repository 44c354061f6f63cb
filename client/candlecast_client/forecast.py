"""A forecast as pandas objects."""

from functools import cached_property
from typing import Final

import pandas as pd

from candlecast_client.schema import ForecastAnswer, Meta, ModelName, Skill

_COLUMNS: Final = ("open", "high", "low", "close", "volume")


class Forecast:
    """One answer of the service; `answer` is its JSON, with all that has no property here."""

    def __init__(self, answer: ForecastAnswer) -> None:
        self.answer = answer

    def __repr__(self) -> str:
        model = f"{self.model['name']}@{self.model['version']}"
        return f"<Forecast {self.symbol} {self.interval} as of {self.as_of}, {self.horizon} steps by {model}>"

    @property
    def symbol(self) -> str:
        """As the service stores it: BTC/USDT is BTC-USDT."""
        return self.answer["symbol"]

    @property
    def interval(self) -> str:
        """Such as 1h."""
        return self.answer["interval"]

    @property
    def model(self) -> ModelName:
        """The version that answered."""
        return self.answer["model"]

    @property
    def horizon(self) -> int:
        """How many steps."""
        return self.answer["horizon"]

    @property
    def last_close(self) -> float:
        """The close of the last candle used."""
        return self.answer["last_close"]

    @property
    def naive(self) -> float:
        """The forecast to beat: this close at every step."""
        return self.answer["naive"]["close"]

    @property
    def skill(self) -> Skill | None:
        """How the version did against the naive forecast so far; `relative_mae` below 1 is better."""
        return self.answer["skill"]

    @property
    def do_predict(self) -> bool:
        """False: do not act on it; `reasons` say why."""
        return self.answer["do_predict"] == 1

    @property
    def reasons(self) -> list[str]:
        """Why not to act on it."""
        return self.answer["reasons"]

    @property
    def warnings(self) -> list[str]:
        """What was done with the request that it did not say."""
        return self.answer["warnings"]

    @property
    def meta(self) -> Meta:
        """How the answer came about."""
        return self.answer["meta"]

    @property
    def is_stale(self) -> bool:
        """Whether candles or time have passed it, and the next one is not there."""
        return "stale" in self.meta["degraded"]

    @property
    def as_of(self) -> pd.Timestamp:
        """When the last candle used closed, UTC."""
        return _instant(self.answer["as_of"])

    @property
    def issued_at(self) -> pd.Timestamp:
        """When the service answered, by its own clock, UTC."""
        return _instant(self.answer["issued_at"])

    @property
    def valid_until(self) -> pd.Timestamp:
        """When the first forecast candle closes, or an hour after `issued_at` where that is past, UTC."""
        return _instant(self.answer["valid_until"])

    @cached_property
    def timestamps(self) -> pd.DatetimeIndex:
        """`[H]` openings of the forecast candles, UTC."""
        return pd.to_datetime([row[0] for row in self.answer["forecast"]], unit="ms", utc=True).rename("timestamp")

    @cached_property
    def forecast(self) -> pd.DataFrame:
        """`[H, 5]` open, high, low, close, volume: each row is a valid candle."""
        return pd.DataFrame([row[1:] for row in self.answer["forecast"]], self.timestamps, _COLUMNS)

    @cached_property
    def quantiles(self) -> pd.DataFrame:
        """`[H, ...]` prices with columns (price, level): `quantiles["close"][0.9]`, `quantiles["low"][0.1]`."""
        columns = {
            (price, float(level)): values
            for price, by_level in self.answer["quantiles"].items()
            for level, values in by_level.items()
        }
        return pd.DataFrame(columns, self.timestamps).rename_axis(columns=["price", "level"])

    @cached_property
    def returns(self) -> pd.DataFrame:
        """`[H, 3]` log-returns: `cumulative` since the last close and `step` by step; `prob_up`, the probability that
        the close is above the last one."""
        told = self.answer["returns"]
        columns = {"cumulative": told["cumulative"]["point"], "step": told["step"]["point"], "prob_up": told["prob_up"]}
        return pd.DataFrame(columns, self.timestamps)

    @cached_property
    def paths(self) -> pd.DataFrame | None:
        """`[S * H, 5]` drawn futures, indexed by (path, timestamp); None unless they were asked for."""
        drawn = self.answer.get("paths")
        if drawn is None:
            return None
        index = pd.MultiIndex.from_product([range(len(drawn)), self.timestamps], names=["path", "timestamp"])
        return pd.DataFrame([row for path in drawn for row in path], index, _COLUMNS)


def _instant(milliseconds: int) -> pd.Timestamp:
    return pd.Timestamp(milliseconds, unit="ms", tz="UTC")
