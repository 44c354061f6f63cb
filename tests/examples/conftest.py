"""A real service to trade against, and the same candles with another future."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.service import start_service
from candlecast_client import Candlecast
from model_store.store import ModelStore

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(store: Path, home: Path) -> Iterator[str]:
    """The address of a service in a process of its own."""
    with start_service(ModelStore(store), home, {"CANDLECAST_RUNTIME": "eager-float32"}) as service:
        yield service.url


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory, put_tiny: Any) -> Iterator[str]:
    """Of a service whose Toto has random weights: its forecasts depend on every candle."""
    place = tmp_path_factory.mktemp("bots")
    put_tiny(ModelStore(place / "store"), "toto")
    with serving(place / "store", place / "home") as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[Candlecast]:
    with Candlecast(url, timeout=120) as client:
        yield client


def with_another_future(candles: pd.DataFrame, known: int) -> pd.DataFrame:
    """The same first `known` candles, then others."""
    other = candles.copy()
    factors = np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.1, len(candles) - known)))
    other.iloc[known:] = other.iloc[known:].mul(factors, axis=0)
    return other
