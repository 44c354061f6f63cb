"""The fast reader of bodies means what the thorough one means."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.wire import _plain_object, _unique, strict_json

numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
values = st.none() | st.booleans() | numbers | st.text() | st.lists(st.lists(numbers))


@given(st.dictionaries(st.text(), values, max_size=6))
def test_both_readers_agree_to_the_last_bit(body: dict[str, Any]) -> None:
    for text in (json.dumps(body), json.dumps(body, ensure_ascii=False)):
        found = _plain_object(text.encode(errors="surrogatepass"))
        assert found is None or repr(found) == repr(json.loads(text, object_pairs_hook=_unique))


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": 1, "\\u0061": 2}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": [{"b": 1}, {"c": 1}]}',
        b"[1]",
        b"{",
        b"",
        b'{"a": "\xff"}',
    ],
)
def test_whatever_could_be_ambiguous_is_left_to_the_thorough_reader(body: bytes) -> None:
    assert _plain_object(body) is None


def test_a_body_of_candles_is_read_fast() -> None:
    body = {"model": "toto", "candles": [[1700006400000, 1.0, 1.1, 0.9, 1.05, 120.0]]}
    assert _plain_object(json.dumps(body).encode()) == body


def test_the_most_candles_that_a_request_may_hold_are_read_in_their_widest_form() -> None:
    candle = {"timestamp": 1700006400000, "open": 1, "high": 1, "low": 1, "close": 1, "volume": 1, "amount": 1}
    assert len(strict_json(json.dumps({"candles": [candle] * 20_000}).encode())["candles"]) == 20_000
