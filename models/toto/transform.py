"""What a version's network sees of candles: their values, or scaled logarithms, and the way back."""

from dataclasses import dataclass

import numpy as np

from models.candles import AMOUNT, CLOSE, VOLUME, Floats

_VOLUME_FLOOR = 1e-3  # of the median traded volume: a candle without trades has no logarithm


@dataclass(frozen=True)
class Identity:
    """The published checkpoints: raw values."""

    has_mean = True

    def encode(self, candles: Floats, context: int) -> Floats:
        """`[..., T, 6]` candles to `[..., T, 5]` values."""
        return candles[..., :AMOUNT]

    def decode(self, values: Floats, context: Floats) -> Floats:
        """`[..., 5]` values back to prices and volumes."""
        return values


@dataclass(frozen=True)
class LogScales:
    """price x log(p / first close) and volume x log(v / first volume).

    Toto's scaler adds 0.1 to every variance, which drowns the raw prices of a currency pair near 1; a
    percentage-like scale makes all symbols look alike. The first candle of the context is the origin.
    """

    price: float
    volume: float

    has_mean = False  # a Student-T logarithm has no mean price

    def encode(self, candles: Floats, context: int) -> Floats:
        """`[..., T, 6]` candles to `[..., T, 5]` values, from statistics of the first `context` candles."""
        close, volume, floor = self._origin(candles[..., :context, :])
        prices = np.log(candles[..., :VOLUME] / close) * self.price
        traded = np.log(np.maximum(candles[..., VOLUME : VOLUME + 1], floor) / volume) * self.volume
        return np.concatenate([prices, traded], axis=-1)

    def decode(self, values: Floats, context: Floats) -> Floats:
        """`[..., 5]` values back to prices and volumes; `context` `[T, 6]` is what was encoded."""
        close, volume, _ = self._origin(context)
        prices = np.exp(values[..., :VOLUME] / self.price) * close[0]
        traded = np.exp(values[..., VOLUME:] / self.volume) * volume[0]
        return np.concatenate([prices, traded], axis=-1)

    def _origin(self, context: Floats) -> tuple[Floats, Floats, Floats]:
        """First close, first volume and the volume floor, `[..., 1, 1]` each."""
        volumes = context[..., VOLUME]
        traded = np.where(volumes > 0, volumes, np.nan)
        traded = np.where((volumes > 0).any(axis=-1, keepdims=True), traded, 1.0)
        floor = np.nanmedian(traded, axis=-1)[..., None, None] * _VOLUME_FLOOR
        first = np.maximum(context[..., :1, VOLUME : VOLUME + 1], floor)
        return context[..., :1, CLOSE : CLOSE + 1], first, floor


Transform = Identity | LogScales


def transform_of(log_scales: tuple[float, float] | None) -> Transform:
    """The transform that a version's `log_scales` (price, volume) names."""
    return LogScales(*log_scales) if log_scales else Identity()
