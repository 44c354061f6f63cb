"""The reference Kronos-small as the servers beside ours wrap it: JSON in, JSON out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.published import HOUR_MS, KRONOS
from bench.references import KronosReference
from models.candles import with_amount
from models.forecaster import ForecastInput, Sampling


class ReferencePredictor:
    """Answers `{"candles": ccxt rows, "horizon": H, "samples": S}` with rows of the mean path."""

    def __init__(self, device: str = "cpu") -> None:
        self._reference = KronosReference(KRONOS["small"], device)

    def predict(self, body: dict[str, Any]) -> dict[str, Any]:
        """One forecast."""
        return self.predict_batch([body])[0]

    def predict_batch(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Several forecasts of one shape in one call of `predict_batch`."""
        rows = self._reference.forecast_batch([_item(body) for body in bodies])
        return [{"forecast": values.tolist()} for values in rows]


def _item(body: dict[str, Any]) -> ForecastInput:
    rows, horizon = np.array(body["candles"], dtype=np.float64), body["horizon"]
    times = rows[:, 0].astype(np.int64)
    future = times[-1] + HOUR_MS * np.arange(1, horizon + 1)
    return ForecastInput(
        timestamps=times,
        candles=with_amount(rows[:, 1:6]),
        future_timestamps=future,
        local_times=np.concatenate([times, future]),
        sampling=Sampling(samples=body["samples"]),
    )
