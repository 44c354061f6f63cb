"""Family name to forecaster: the one place where a stored version becomes something that forecasts."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from models.forecaster import Forecaster
from models.kronos.forecaster import KronosForecaster
from models.naive import NaiveForecaster
from models.toto.forecaster import TotoForecaster

Weights = Mapping[str, torch.Tensor]

_BUILDERS: Final[Mapping[str, Callable[[Mapping[str, Any], Weights, str], Forecaster]]] = {
    "toto": TotoForecaster.from_weights,
    "kronos": KronosForecaster.from_weights,
    "naive": lambda config, weights, device: NaiveForecaster(),
}
FAMILIES: Final = tuple(_BUILDERS)


def build_forecaster(family: str, config: Mapping[str, Any], weights: Weights, device: str = "cpu") -> Forecaster:
    """The forecaster of a version's `config.json` and tensors.

    Raises WeightsMismatch naming every tensor that is missing, extra or of another shape.
    """
    return _BUILDERS[family](config, weights, device)
