"""Family name to forecaster: the one place where a stored version becomes something that forecasts."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from models.forecaster import Forecaster
from models.kronos.forecaster import KronosForecaster
from models.layers import WeightsMismatch
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

    It may share memory with the tensors. Raises WeightsMismatch, which names every tensor that is missing, extra or
    of another shape, or what of the config describes no network; nothing is allocated before all that is compared.
    """
    try:
        return _BUILDERS[family](config, weights, device)
    except WeightsMismatch:
        raise
    except KeyError as error:
        raise WeightsMismatch(f"{family} config lacks {error}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise WeightsMismatch(str(error)) from error
