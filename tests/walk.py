"""The random walk of the tables as a model, for tests of whatever works with forecasts."""

from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from models import scoring
from models.candles import CLOSE
from models.forecaster import Batch, Forecast, ForecastInput, Row, checked
from models.naive import NaiveForecaster, naive_rows
from models.quantiles import path_quantiles
from models.uniforms import draw_uniforms

_inverse = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])


class WalkForecaster(NaiveForecaster):
    """EWMA volatility of its context times `spread`; paths or exact quantiles."""

    def __init__(self, *, with_paths: bool = False, spread: float = 1.0, decay: float = scoring.WALK_DECAY) -> None:
        self._with_paths = with_paths
        self._spread = spread
        self._decay = decay
        self.seen: list[ForecastInput] = []

    def bucket(self, item: ForecastInput) -> Hashable:
        return len(item.candles) % 3  # so that batches leave out of order

    def prepare(self, inputs: Sequence[ForecastInput], rows: Sequence[Row] | None = None) -> Batch:
        assert len({self.bucket(item) for item in inputs}) == 1
        self.seen += inputs
        return super().prepare(inputs, rows)

    def _forecast(self, item: ForecastInput) -> Forecast:
        returns = scoring.log_returns(item.candles[:, CLOSE])
        volatility = self._spread * scoring.ewma_volatility(returns, self._decay)[-1]
        sigma = scoring.walk_sigma(np.array(volatility), item.horizon)
        paths = None
        quantiles = scoring.walk_quantiles(sigma, item.all_levels)
        if self._with_paths:
            shocks = _inverse(draw_uniforms(item.seed, item.sampling.samples, item.horizon, 1)[:, :, 0])
            walks = np.cumsum(shocks * volatility, axis=1)
            quantiles = path_quantiles(walks, item.all_levels)
            paths = np.repeat((item.last_close * np.exp(walks))[:, :, None], 5, axis=2)
        closes = item.last_close * np.exp(quantiles)
        return checked(
            Forecast(
                point=naive_rows(item.candles, item.horizon),
                levels=item.all_levels,
                quantiles={"close": closes, "high": closes, "low": closes},
                prob_up=np.full(item.horizon, 0.5),
                paths=paths,
            )
        )
