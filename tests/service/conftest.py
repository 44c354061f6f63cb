"""A real service per test: naive versions in a temporary store, a private Redis, the ASGI app over httpx."""

import threading
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI

from model_store.manifest import Manifest
from model_store.store import ModelStore
from models.forecaster import Abandoned, Batch, Forecast, ForecastInput, InvalidModelOutput, Raw, Row, Wanted, always
from models.naive import NaiveForecaster
from service.app import create_app
from service.settings import Settings
from service.state import State

HOUR = 3_600_000
NOW = 1_750_000_000_000  # 2025-06-15 15:06:40 UTC, a Sunday


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def now() -> int:
    return NOW


@dataclass
class Clock:
    """A wall clock that goes when it is told to."""

    now: int

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(now: int) -> Clock:
    return Clock(now)


class Faulty(NaiveForecaster):
    """The naive forecaster with switches: hold every batch in `run` or `finish`, take steps while it is held, fail
    the next one, spoil its output, refuse a seed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.entered = threading.Event()
        self.steps = False
        self.encoded: list[int] = []
        self.threads: list[str] = []
        self.failure: BaseException | None = None
        self.spoil = False
        self.guilty: int | None = None
        self.fits = 1000  # rows
        self.batches: list[list[int]] = []

    def bucket(self, item: ForecastInput) -> Hashable:
        return item.horizon

    def encode(self, item: ForecastInput) -> Row:
        self.encoded.append(item.seed)
        return super().encode(item)

    def run(self, batch: Batch, wanted: Wanted = always) -> Raw:
        self.entered.set()
        self.threads.append(threading.current_thread().name)
        while not self.open.wait(0.01 if self.steps else 10):
            if not wanted():
                raise Abandoned
        self.batches.append([item.seed for item in batch.inputs])
        failure, self.failure = self.failure, None
        if failure:
            raise failure
        if len(batch.inputs) > self.fits:
            raise torch.OutOfMemoryError
        return {}

    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        self.threads.append(threading.current_thread().name)
        self.may_finish.wait(10)
        if self.guilty in (item.seed for item in batch.inputs):
            raise InvalidModelOutput("a row is no forecast")
        forecasts = super().finish(raw, batch)
        if self.spoil:
            forecasts[0].prob_up[0] = np.nan
        return forecasts


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    forecaster = Faulty()
    yield forecaster
    forecaster.open.set()
    forecaster.may_finish.set()


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def put_version_without_weights(store: ModelStore, model: str = "naive", **fields: Any) -> Manifest:
    """Store and promote a version of family naive; keywords replace fields of its manifest."""
    manifest = {
        "model": model,
        "family": "naive",
        "origin": {"kind": "trained", "source": "test"},
        "limits": {"min_context": 2, "max_context": 4096, "max_horizon": 512},
        "created_at": "2025-01-01T00:00:00Z",
        **fields,
    }
    complete = store.put(manifest, {"family": manifest["family"]}, {})
    store.promote(f"{model}@{complete.version}", force="test")
    return complete


PutNaive = Callable[..., Manifest]


@pytest.fixture
def put_naive(store: ModelStore) -> PutNaive:
    """Store and promote a weightless version; keywords replace fields of its manifest."""

    return partial(put_version_without_weights, store)


def build_naive(*_: Any) -> NaiveForecaster:
    return NaiveForecaster()


Running = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, FastAPI]]]


@pytest.fixture
def running(tmp_path: Path, store: ModelStore, put_naive: PutNaive) -> Running:
    """Start the app in-process: `async with running(max_queue=1) as (client, app)`."""
    put_naive()
    put_naive("toto-demo")

    @asynccontextmanager
    async def start(
        *, build: Any = build_naive, now: Callable[[], int] = lambda: NOW, **settings: Any
    ) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
        chosen = Settings(**{"home": tmp_path / "home", "store_root": store.root, **settings})
        app = create_app(chosen, build=build, now=now)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client, app

    return start


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is waited for and taken for up, however busy the machine is."""
    monkeypatch.setattr("service.line._PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(State, "up", property(lambda _: True, lambda _, __: None), raising=False)


@pytest.fixture
async def client(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with running() as (client, _):
        yield client


@pytest.fixture
def faulty_build(faulty: Faulty) -> Any:
    return lambda version, device: faulty


Rows = Callable[..., list[list[float]]]


@pytest.fixture
def rows() -> Rows:
    """ccxt rows: `count` valid hourly candles, the last of which closed before NOW."""

    def make(count: int = 8, *, step: int = HOUR, end: int | None = None) -> list[list[float]]:
        last = (end if end is not None else NOW) // step * step - step
        times = [last - step * back for back in range(count)][::-1]
        closes = 100 + np.sin(np.arange(count)) * 3
        return [
            [time, close - 0.5, close + 1.25, close - 1.5, close, 10.0 + place]
            for place, (time, close) in enumerate(zip(times, closes.tolist(), strict=True))
        ]

    return make


@pytest.fixture
def forecast_input() -> Callable[..., ForecastInput]:
    def make(seed: int = 0, horizon: int = 3) -> ForecastInput:
        times = np.arange(4, dtype=np.int64) * HOUR
        future = (np.arange(horizon, dtype=np.int64) + 4) * HOUR
        return ForecastInput(times, np.full((4, 6), 5.0), future, np.concatenate([times, future]), seed=seed)

    return make
