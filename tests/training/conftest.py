from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model_store.store import ModelStore
from models.candles import DAY_MS, Floats, with_amount
from training.candle_files import Series, load, read
from training.sample_data import write_samples


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    return folder


@pytest.fixture(scope="session")
def samples(sample_folder: Path) -> list[Series]:
    return load(sample_folder)[0]


@pytest.fixture(scope="session")
def eurusd(packaged_candles: Callable[[str], Path]) -> Series:
    """Hourly candles with weekend gaps."""
    return read(packaged_candles("EURUSD.csv"))[0]


@pytest.fixture
def store(tmp_path: Path, put_tiny: Callable[..., object]) -> ModelStore:
    """With a tiny version of each family."""
    store = ModelStore(tmp_path / "store")
    for family in ("toto", "kronos"):
        put_tiny(store, family)
    return store


def candles_of(closes: Floats) -> Floats:
    """`[T, 6]` valid candles around `closes`."""
    prices = np.column_stack([closes, closes * 1.01, closes * 0.99, closes])
    return with_amount(np.column_stack([prices, np.full(len(closes), 1000.0)]))


@pytest.fixture
def make_series() -> Callable[..., Series]:
    def make(symbol: str, closes: Floats, *, first_day: int = 12_000, interval: str = "1d") -> Series:
        timestamps = (first_day + np.arange(len(closes), dtype=np.int64)) * DAY_MS
        return Series(symbol, interval, timestamps, candles_of(closes))

    return make
