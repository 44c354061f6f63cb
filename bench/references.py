"""The reference implementations with random weights, called as their documentation says."""

import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bench.published import kronos_weights, toto_weights
from models.candles import VARIATES, Floats
from models.forecaster import ForecastInput

COLUMNS = [*VARIATES, "amount"]


def build_toto(config: dict[str, Any]) -> nn.Module:
    """The reference Toto of a published config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of xFormers, which only a GPU wants, and of faster readers of JSON
        from toto.model.toto import Toto

    torch.manual_seed(0)
    network: nn.Module = Toto(**config).eval()
    return network


def build_kronos(config: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The reference tokenizer and predictor of a published config."""
    from model import Kronos, KronosTokenizer

    torch.manual_seed(0)
    return KronosTokenizer(**config["tokenizer"]).eval(), Kronos(**config["predictor"]).eval()


class KronosReference:
    """`KronosPredictor.predict` on a data frame, with a request's own sampling settings."""

    def __init__(self, config: dict[str, Any], device: str = "cpu") -> None:
        from model import KronosPredictor

        tokenizer, network = build_kronos(config)
        self.weights: dict[str, Tensor] = kronos_weights(tokenizer, network)
        self._predictor = KronosPredictor(network, tokenizer, device=device, max_context=config["context"])

    def forecast(self, item: ForecastInput) -> Floats:
        """`[H, 6]`: the mean of the drawn paths."""
        frame = self._predictor.predict(*_frames(item), item.horizon, **_settings(item))
        values: Floats = frame[COLUMNS].to_numpy()
        return values

    def forecast_batch(self, items: Sequence[ForecastInput]) -> list[Floats]:
        """`predict_batch` on requests of one context, horizon and sampling."""
        frames = zip(*(_frames(item) for item in items), strict=True)
        found = self._predictor.predict_batch(*map(list, frames), items[0].horizon, **_settings(items[0]))
        return [frame[COLUMNS].to_numpy() for frame in found]


class TotoReference:
    """`TotoForecaster.forecast` on the five variates of one symbol."""

    def __init__(self, config: dict[str, Any], device: str = "cpu") -> None:
        network = build_toto(config)
        from toto.inference.forecaster import TotoForecaster

        self.weights: dict[str, Tensor] = toto_weights(network)
        self._device = device
        self._forecaster = TotoForecaster(network.to(device).get_submodule("model"))

    def forecast(self, item: ForecastInput, samples: int | None, at_once: int = 16) -> Floats:
        """`[5, H]` means; with `samples` drawn, `[Q, 5, H]` quantiles at the levels of the request."""
        from toto.data.util.dataset import MaskedTimeseries

        series = torch.tensor(item.candles.T[: len(VARIATES)], dtype=torch.float32, device=self._device)
        ones = torch.ones_like(series)
        interval = torch.full((len(series),), 3600, device=self._device)
        given = MaskedTimeseries(series, ones.bool(), torch.zeros_like(series), ones.int() * 0, interval)
        result = self._forecaster.forecast(given, item.horizon, num_samples=samples, samples_per_batch=at_once)
        if samples is None:
            mean: Floats = result.mean[0].cpu().numpy()
            return mean
        quantiles: Floats = torch.stack([result.quantile(level)[0] for level in item.levels]).cpu().numpy()
        return quantiles


def _frames(item: ForecastInput) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """The context, its timestamps and the future's."""
    times, context = pd.Series(pd.to_datetime(item.local_times, unit="ms")), len(item.candles)
    return pd.DataFrame(item.candles, columns=COLUMNS), times[:context], times[context:].reset_index(drop=True)


def _settings(item: ForecastInput) -> dict[str, Any]:
    sampling = item.sampling
    drawn = {"top_k": sampling.top_k, "top_p": sampling.top_p, "sample_count": sampling.samples}
    return {"T": sampling.temperature, **drawn, "verbose": False}
