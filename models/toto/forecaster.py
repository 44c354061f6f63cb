"""Toto behind the Forecaster contract: one pass, last patch only, exact quantiles of the mixture."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from models.candles import AMOUNT, CLOSE, VARIATES, VOLUME, Floats
from models.forecaster import (
    QUANTILE_COLUMNS,
    Batch,
    Forecast,
    ForecastInput,
    Limits,
    ModelError,
    Raw,
    bucket_of,
    checked,
    pad_rows,
)
from models.layers import load_strictly
from models.toto import mixture as student_mixture
from models.toto.network import Mixture, TotoConfig, TotoNetwork

# Whole patches in fours: every matrix product then has a multiple of 4 rows, whose bits on a CPU do not
# depend on how many rows there are.
_TAIL: Final = 4
_PRICE_FLOOR: Final = 1e-6  # of the last close
_VOLUME_FLOOR: Final = 1e-3  # of the median volume, under a logarithm


class TotoDecoder(nn.Module):
    """The pure function that runtimes execute: `forward`."""

    def __init__(self, network: TotoNetwork) -> None:
        super().__init__()
        self.network = network
        weight, bias = network.double().composed_head()
        network.float()
        self.register_buffer("head", weight.detach().flatten(0, 1).float())  # [S * 4K, D]
        self.register_buffer("head_bias", bias.detach().flatten().float())

    def forward(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Head outputs `[B, V, S, 4K]` of the last patch, its location and its scale `[B, V]`.

        `values` `[B, V, T]` are raw, zero where `weights` `[B, 1, T]` is zero (left padding).
        """
        loc, scale = self.network.scale(values, weights)
        hidden = self.network.embed(values, weights, loc, scale, _TAIL)
        projected = nn.functional.linear(hidden, self.head, self.head_bias)[:, :, -1]
        return projected.unflatten(-1, (self.network.config.patch_size, -1)), loc[..., -1], scale[..., -1]


class TotoForecaster:
    """Deterministic forecasts of up to one patch: quantiles are marginal per step, there are no paths."""

    family = "toto"

    def __init__(self, network: TotoNetwork, *, max_context: int, log_scales: tuple[float, float] | None = None) -> None:
        """`log_scales` (price, volume): the network sees scale x log(value / first value) instead of values."""
        self.network = network.eval()
        self.decoder = TotoDecoder(self.network).eval()
        patch = network.config.patch_size
        self.limits = Limits(min_context=2, max_context=max_context, max_horizon=patch)
        self._log_scales = log_scales
        self._contexts = [_TAIL * patch]
        while self._contexts[-1] < max_context:
            self._contexts.append(2 * self._contexts[-1])

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], device: str) -> "TotoForecaster":
        """From a version's `config.json` and tensors; WeightsMismatch or ValueError if they do not fit."""
        network = TotoNetwork(TotoConfig.from_published(config["network"]))
        load_strictly(network, weights, "Toto")
        scales = config.get("log_scales")
        return cls(
            network.to(device),
            max_context=config["max_context"],
            log_scales=(float(scales[0]), float(scales[1])) if scales else None,
        )

    def bucket(self, item: ForecastInput) -> Hashable:
        return bucket_of(len(item.candles), self._contexts)

    def prepare(self, inputs: Sequence[ForecastInput]) -> Batch:
        rows, length = pad_rows(len(inputs)), bucket_of(max(len(i.candles) for i in inputs), self._contexts)
        values = np.zeros((rows, len(VARIATES), length), dtype=np.float32)
        weights = np.zeros((rows, 1, length), dtype=np.float32)
        for row, item in enumerate(inputs):
            series = self._encode(item.candles)
            values[row, :, length - len(series) :] = series.T
            weights[row, :, length - len(series) :] = 1
        device = self.decoder.head.device
        tensors = {"values": torch.from_numpy(values).to(device), "weights": torch.from_numpy(weights).to(device)}
        return Batch(inputs, tensors, rows)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Raw:
        projected, loc, scale = self.decoder(batch.tensors["values"], batch.tensors["weights"])
        return {"projected": projected, "loc": loc, "scale": scale}

    @torch.inference_mode()
    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        projected, loc, scale = (raw[name].double().cpu() for name in ("projected", "loc", "scale"))
        return [
            self._forecast(item, self.network.mixture(projected[row, :, : item.horizon]), loc[row], scale[row])
            for row, item in enumerate(batch.inputs)
        ]

    def _forecast(self, item: ForecastInput, steps: Mixture, loc: Tensor, scale: Tensor) -> Forecast:
        """`steps` is `[V, H, K]` in the scaler's units; location and scale `[V]` undo it."""
        if item.aggregate not in ("median", "mean"):
            raise ModelError(f"Toto has no paths: aggregate {item.aggregate!r} is not median or mean", "aggregate")
        if item.aggregate == "mean" and self._log_scales:
            raise ModelError("this version forecasts logarithms, whose price has no mean: use median", "aggregate")
        levels = (*item.levels, 0.5)
        unscaled = student_mixture.quantiles(steps, levels) * scale.unsqueeze(-1) + loc.unsqueeze(-1)  # [Q + 1, V, H]
        quantiles = self._decode(unscaled.numpy(), item)
        point = quantiles[-1]
        if item.aggregate == "mean":
            expected = student_mixture.mean(steps) * scale.unsqueeze(-1) + loc.unsqueeze(-1)
            point = self._decode(expected.numpy()[None], item)[0]
        reached = self._encode_close(item)
        prob_up = 1 - student_mixture.cdf(_variate(steps, CLOSE), (reached - loc[CLOSE]) / scale[CLOSE])
        return checked(
            Forecast(
                point=point.T,
                levels=item.levels,
                quantiles={name: quantiles[:-1, VARIATES.index(name)] for name in QUANTILE_COLUMNS},
                prob_up=prob_up.numpy(),
            )
        )

    # -- the version's transform -----------------------------------------------------------------

    def _encode(self, candles: Floats) -> Floats:
        """What the network sees of `[T, 6]` candles, `[T, 5]`."""
        if not self._log_scales:
            return candles[:, :AMOUNT]
        price, volume = self._log_scales
        logs = np.log(candles[:, :VOLUME] / candles[0, CLOSE]) * price
        return np.column_stack([logs, np.log(candles[:, VOLUME].clip(_volume_floor(candles))) * volume - self._volume_origin(candles)])

    def _volume_origin(self, candles: Floats) -> float:
        assert self._log_scales
        return float(np.log(max(candles[0, VOLUME], _volume_floor(candles))) * self._log_scales[1])

    def _encode_close(self, item: ForecastInput) -> Tensor:
        return torch.tensor(self._encode(item.candles)[-1, CLOSE], dtype=torch.float64)

    def _decode(self, values: Floats, item: ForecastInput) -> Floats:
        """Prices and volumes `[Q, V, H]` of network units, prices floored above zero."""
        out = values.copy()
        if self._log_scales:
            price, volume = self._log_scales
            out[:, :VOLUME] = np.exp(values[:, :VOLUME] / price) * item.candles[0, CLOSE]
            out[:, VOLUME] = np.exp((values[:, VOLUME] + self._volume_origin(item.candles)) / volume)
        out[:, :VOLUME] = np.maximum(out[:, :VOLUME], _PRICE_FLOOR * item.last_close)
        return out


def _variate(steps: Mixture, index: int) -> Mixture:
    return Mixture(*(parameter[index] for parameter in steps))


def _volume_floor(candles: Floats) -> float:
    """A small positive volume in the series' own units: a candle without trades has no logarithm."""
    traded = candles[candles[:, VOLUME] > 0, VOLUME]
    return float(np.median(traded)) * _VOLUME_FLOOR if len(traded) else 1.0
