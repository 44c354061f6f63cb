"""The naive forecast: last close for ever. Baseline of every table, weightless model of smoke tests."""

from collections.abc import Hashable, Sequence

import numpy as np

from models.candles import CLOSE, OPEN, VOLUME, Floats
from models.forecaster import Batch, Forecast, ForecastInput, Limits, Raw, Row, Wanted, always, checked


def naive_rows(candles: Floats, horizon: int) -> Floats:
    """`[H, 5]`: open, high, low and close stay at the last close, volume at the last volume."""
    rows = np.empty((horizon, 5))
    rows[:, OPEN : CLOSE + 1] = candles[-1, CLOSE]
    rows[:, VOLUME] = candles[-1, VOLUME]
    return rows


class NaiveForecaster:
    """Every quantile is the last close: it claims no spread, so its coverage is honestly zero."""

    family = "naive"
    limits = Limits(min_context=1, max_context=4096, max_horizon=512)

    def check(self, item: ForecastInput) -> None:
        self.limits.check(item)

    def max_rows(self, item: ForecastInput) -> int:
        return 4096

    def bucket(self, item: ForecastInput) -> Hashable:
        return ()

    def encode(self, item: ForecastInput) -> Row:
        return {}

    def prepare(self, inputs: Sequence[ForecastInput], rows: Sequence[Row] | None = None) -> Batch:
        return Batch(inputs, {}, len(inputs))

    def run(self, batch: Batch, wanted: Wanted = always) -> Raw:
        return {}

    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        return [self._forecast(item) for item in batch.inputs]

    def _forecast(self, item: ForecastInput) -> Forecast:
        point = naive_rows(item.candles, item.horizon)
        flat = np.full((len(item.all_levels), item.horizon), item.last_close)
        return checked(
            Forecast(
                point=point,
                levels=item.all_levels,
                quantiles={"high": flat, "low": flat, "close": flat},
                prob_up=np.full(item.horizon, 0.5),
                step_return_quantiles=np.zeros_like(flat),
            )
        )
