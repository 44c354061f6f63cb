"""The ways in which this project can run one version: what every row chooses its headline from."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.families import build_forecaster
from models.forecaster import Forecaster


def contenders(
    family: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], device: str
) -> dict[str, Forecaster]:
    """Those that run here and whose parity with fp32 eager holds, by runtime and dtype as the service names them."""
    return {"eager float32": build_forecaster(family, config, weights, device)}
