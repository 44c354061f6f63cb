"""Leaks, by name: nothing that a model is given, is scaled by or is trained on knows what comes after it."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.published import TOTO_TINY, toto_config
from models.candles import DAY_MS, Floats
from models.forecaster import Forecaster
from models.toto.network import TotoConfig, TotoNetwork
from models.toto.transform import Identity, LogScales, Transform
from training.candle_files import Series, read_rows, read_table
from training.objectives import normalised_windows
from training.outcomes import outcomes
from training.windows import (
    Origins,
    Part,
    Split,
    WindowSampler,
    forecast_input,
    rolling_origins,
    series_calendar,
)

PARTS: tuple[Part, ...] = ("train", "val", "test", "unseen")
ORIGIN = 2000


def other_future(item: Series, origin: int) -> Series:
    """The same candles up to `origin`, then a market ten times as dear and wild."""
    candles = item.candles.copy()
    later = candles[origin + 1 :]
    later *= np.exp(np.random.default_rng(0).normal(2, 0.5, (len(later), 1)))
    return replace(item, candles=candles)


# -- the split -------------------------------------------------------------------------------------


@st.composite
def markets(draw: st.DrawFn) -> tuple[list[Series], Split]:
    """Symbols with holes, that begin and end on different days, one of them held out, cut anywhere."""
    series = []
    for symbol in ("AAA", "BBB", "UNSEEN"):
        first, length = draw(st.integers(4000, 4040)), draw(st.integers(30, 160))
        holes = draw(st.sets(st.integers(1, length - 2), max_size=20))
        days = first + np.delete(np.arange(length, dtype=np.int64), list(holes))
        series.append(Series(symbol, "1d", days * DAY_MS, np.ones((len(days), 6))))
    cuts = sorted(draw(st.lists(st.integers(3990, 4230), min_size=2, max_size=2)))
    return series, Split(cuts[0] * DAY_MS, cuts[1] * DAY_MS, draw(st.integers(1, 20)), frozenset({"UNSEEN"}))


@settings(max_examples=150, deadline=None)
@given(markets(), st.integers(2, 40), st.data())
def test_leak_no_two_parts_share_a_target_and_a_horizon_lies_between_them(
    market: tuple[list[Series], Split], length: int, data: st.DataObject
) -> None:
    series, split = market
    horizon = data.draw(st.integers(1, split.horizon))
    reached: dict[Part, dict[str, set[int]]] = {part: {item.symbol: set() for item in series} for part in PARTS}
    for part in PARTS[1:]:
        for index, origin in rolling_origins(series, split, part, stride=1, min_context=2, horizon=horizon).pairs:
            reached[part][series[index].symbol] |= set(range(origin + 1, origin + 1 + horizon))
    if any(len(split.targets(item, "train")) >= length for item in series):
        drawn = WindowSampler(series, split, length, calendar="24/7").draw(64, np.random.default_rng(0))
        for index, times in zip(drawn.series, drawn.timestamps, strict=True):  # of a window, the whole is a target
            places = np.searchsorted(series[index].timestamps, times).tolist()
            reached["train"][series[index].symbol] |= set(places)
    for symbol in ("AAA", "BBB"):
        order = [reached[part][symbol] for part in ("train", "val", "test") if reached[part][symbol]]
        for earlier, later in pairwise(order):
            assert min(later) - max(earlier) > split.horizon
    assert not any(reached[part]["UNSEEN"] for part in ("train", "val", "test"))


# -- files -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["1,3,0.5,2,10", "1,3,0.5,,10", "2,4,1.5,inf,", "0,1,0,1,1"]), min_size=4, max_size=8))
def test_leak_a_missing_value_is_never_filled_from_a_later_row(rows: list[str]) -> None:
    lines = ["date,open,high,low,close,volume", *(f"2024-01-{day:02},{row}" for day, row in enumerate(rows, 1))]
    early, whole = (read_rows(read_table(BytesIO("\n".join(part).encode()), "it"), "it") for part in (lines[:4], lines))
    assert (early.candle == whole.candle[:3]).all()
    assert np.array_equal(early.candles, whole.candles[:3], equal_nan=True)


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["toto", "kronos"])
def test_leak_a_forecast_does_not_know_what_came_after_its_origin(
    family: str, build_tiny: Callable[..., Forecaster], samples: list[Series]
) -> None:
    apple, forecaster = samples[0], build_tiny(family)
    calendar = series_calendar(apple)
    given = [
        forecast_input(item, ORIGIN, horizon=16, lookback=64, calendar=calendar)
        for item in (apple, other_future(apple, ORIGIN), cut_after(apple, ORIGIN))
    ]
    for other in given[1:]:
        for name in ("timestamps", "candles", "future_timestamps", "local_times"):
            assert (getattr(other, name) == getattr(given[0], name)).all()
        encoded, expected = forecaster.encode(other), forecaster.encode(given[0])
        assert all((encoded[name] == expected[name]).all() for name in expected)


def cut_after(item: Series, origin: int) -> Series:
    return replace(item, timestamps=item.timestamps[: origin + 1], candles=item.candles[: origin + 1])


def test_leak_volatility_of_the_walk_and_of_the_scale_is_that_of_the_past(samples: list[Series]) -> None:
    origins = Origins("test", 16, ((0, ORIGIN),))
    facts, others = (outcomes([item], origins) for item in (samples[0], other_future(samples[0], ORIGIN)))
    assert (facts.walk_sigma == others.walk_sigma).all()
    assert (facts.scale == others.scale).all()
    assert (facts.actual != others.actual).all()


# -- training windows ------------------------------------------------------------------------------


@pytest.fixture
def windows(samples: list[Series]) -> tuple[Floats, Floats]:
    """Windows of 128 candles of context and 64 of targets `[2, 192, 6]`, and the same contexts before other futures."""
    ends = (600, ORIGIN)
    spans = [slice(end + 1 - 128, end + 65) for end in ends]
    return (
        np.stack([samples[0].candles[span] for span in spans]),
        np.stack([other_future(samples[0], end).candles[span] for end, span in zip(ends, spans, strict=True)]),
    )


def test_leak_kronos_windows_are_normalised_by_their_lookback_alone(windows: tuple[Floats, Floats]) -> None:
    first, second = (normalised_windows(candles, 128) for candles in windows)
    assert (first[:, :128] == second[:, :128]).all()
    assert (first[:, 128:] != second[:, 128:]).any()


@pytest.mark.parametrize("transform", [Identity(), LogScales(100.0, 10.0)])
def test_leak_toto_windows_are_encoded_by_their_context_and_scaled_by_the_patches_so_far(
    windows: tuple[Floats, Floats], transform: Transform
) -> None:
    encoded = [transform.encode(candles, 128)[:, :128] for candles in windows]
    assert (encoded[0] == encoded[1]).all()
    config = toto_config(TOTO_TINY | {"num_layers": 1, "stabilize_with_global": False}, 192)
    network = TotoNetwork(TotoConfig.from_published(config["network"]))
    patches = 128 // network.config.patch_size
    scales = []
    for candles in windows:  # as if the targets were context too: patches before them must not notice
        values = torch.from_numpy(transform.encode(candles, 128).astype(np.float32)).transpose(1, 2)
        scales.append(network.scale(values))
    for ours, theirs in zip(*scales, strict=True):
        assert torch.equal(ours[..., :patches], theirs[..., :patches])
        assert not torch.equal(ours, theirs)
