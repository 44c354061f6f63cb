"""The four ways in which bots write candles mean the same candles."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from service.api.candle_formats import parse_candles
from service.api.errors import InputError

HOUR = 3_600_000


@pytest.fixture
def ccxt(rows: Any) -> Any:
    return rows(6)


def rfc3339(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat().replace("+00:00", "Z")


def as_binance(rows: Any) -> Any:
    return [
        [row[0], *(repr(value) for value in row[1:6]), row[0] + HOUR - 1, repr(row[4] * row[5]), 12, "1", "2", "0"]
        for row in rows
    ]


def as_alpaca(rows: Any) -> Any:
    return [dict(zip("tohlcv", [rfc3339(row[0]), *row[1:]], strict=True)) | {"n": 3, "vw": row[4]} for row in rows]


def as_columns(rows: Any) -> Any:
    names = ("timestamp", "open", "high", "low", "close", "volume")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def test_all_forms_hold_the_same_candles(ccxt: Any) -> None:
    plain = parse_candles(ccxt)
    for form in (as_binance, as_alpaca, as_columns):
        parsed = parse_candles(form(ccxt))
        assert (parsed.timestamps == plain.timestamps).all()
        assert (parsed.candles[:, :5] == plain.candles[:, :5]).all()


def test_a_missing_amount_is_mean_price_times_volume(ccxt: Any) -> None:
    parsed = parse_candles(ccxt)
    expected = np.array([np.mean(row[1:5]) * row[5] for row in ccxt])
    assert parsed.candles[:, 5] == pytest.approx(expected)


def test_given_amounts_are_kept(ccxt: Any) -> None:
    close_times_volume = [row[4] * row[5] for row in ccxt]
    for payload in (
        as_binance(ccxt),
        as_alpaca(ccxt),
        [[*row, row[4] * row[5]] for row in ccxt],
        as_columns(ccxt) | {"amount": close_times_volume},
    ):
        assert parse_candles(payload).candles[:, 5].tolist() == close_times_volume


def test_whole_floats_are_milliseconds(ccxt: Any) -> None:
    floats = [[float(row[0]), *row[1:]] for row in ccxt]
    assert (parse_candles(floats).timestamps == parse_candles(ccxt).timestamps).all()


def test_offsets_are_honoured() -> None:
    rows = [[f"2025-06-15T0{hour}:00:00+02:00", 1, 1, 1, 1, 1] for hour in (2, 3)]
    assert parse_candles(rows).timestamps.tolist() == [1749945600000, 1749949200000]


@pytest.mark.parametrize(
    ("form", "break_it", "pointer"),
    [
        (as_alpaca, lambda sent: sent[2].update(c=None), "/candles/2/c"),
        (as_alpaca, lambda sent: sent[2].update(h=1.0), "/candles/2/h"),
        (as_alpaca, lambda sent: sent[2].update(t="never"), "/candles/2/t"),
        (as_alpaca, lambda sent: sent[2].update(vw="1"), "/candles/2/vw"),
        (as_alpaca, lambda sent: sent[2].pop("v"), "/candles/2"),
        (as_alpaca, lambda sent: sent[2].update(x=1), "/candles/2"),
        (as_columns, lambda sent: sent["close"].__setitem__(3, float("nan")), "/candles/close/3"),
        (as_columns, lambda sent: sent["timestamp"].__setitem__(3, 5), "/candles/timestamp/3"),
        (as_columns, lambda sent: sent["low"].pop(), "/candles/low"),
        (as_columns, lambda sent: sent.pop("volume"), "/candles"),
        (as_binance, lambda sent: sent[1].__setitem__(2, "dear"), "/candles/1/2"),
        (as_binance, lambda sent: sent[1].__setitem__(7, "-4"), "/candles/1/7"),
        (as_binance, lambda sent: sent[1].__setitem__(4, True), "/candles/1/4"),
    ],
)
def test_errors_point_into_the_callers_own_form(ccxt: Any, form: Any, break_it: Any, pointer: str) -> None:
    sent = form(ccxt)
    break_it(sent)
    with pytest.raises(InputError) as caught:
        parse_candles(sent)
    assert caught.value.pointer == pointer
