"""Published architectures, the reference implementations, and candles that look like a market's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.published import KRONOS, TOTO_BASE, TOTO_TINY, request, walk
from bench.references import build_kronos, build_toto
from models.candles import Floats
from models.forecaster import ForecastInput


@pytest.fixture(scope="session")
def toto_base() -> dict[str, Any]:
    return TOTO_BASE


@pytest.fixture(scope="session")
def toto_tiny() -> dict[str, Any]:
    return TOTO_TINY


@pytest.fixture(scope="session")
def kronos_config() -> dict[str, dict[str, Any]]:
    return KRONOS


@pytest.fixture(scope="session")
def make_walk() -> Callable[..., Floats]:
    return walk


@pytest.fixture(scope="session")
def make_request() -> Callable[..., ForecastInput]:
    return request


@pytest.fixture(scope="session")
def reference_toto() -> Callable[[dict[str, Any]], torch.nn.Module]:
    """Builds the reference Toto with random weights."""
    return build_toto


@pytest.fixture(scope="session")
def reference_kronos() -> Callable[[dict[str, Any]], tuple[torch.nn.Module, torch.nn.Module]]:
    """Builds the reference tokenizer and predictor with random weights."""
    return build_kronos
