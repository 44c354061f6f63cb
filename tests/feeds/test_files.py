"""Reading CSV and JSON lines in chunks."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from feeds.files import CHUNK_ROWS, Chunk, Line, Part, Reader, chunks
from models.candles import AMOUNT
from training.candle_files import CandleFileError

FIRST = 1_700_006_400_000
HOUR = 3_600_000
CELLS = [1.0, 3.0, 0.5, 2.0, 10.0]


def lines_of(*texts: str) -> list[Line]:
    return [Line(place, text.encode()) for place, text in enumerate(texts, 1)]


def only(parts: list[Part]) -> Part:
    assert len(parts) == 1
    return parts[0]


# -- chunks ----------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):  # a test closed it
            os.close(end)


def test_a_file_comes_in_bounded_chunks_with_the_place_of_every_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("\n".join(f"line {place}" for place in range(1, 2501)) + "\n\n\r\nlast")
    with path.open("rb") as source:
        found = list(chunks(source.fileno(), rows=1000, seconds=60))
    assert [len(chunk.lines) for chunk in found] == [1000, 1000, 501]
    assert found[1].lines[0] == (1001, b"line 1001")
    assert found[-1].lines[-1] == (2503, b"last")
    assert found[-1].read == path.stat().st_size


def test_a_line_does_not_wait_for_more_of_them(pipe: tuple[int, int]) -> None:
    arriving = chunks(pipe[0], rows=1000, seconds=0.01)
    os.write(pipe[1], b"one\ntw")
    assert next(arriving).lines == [(1, b"one")]
    os.write(pipe[1], b"o\n")
    assert next(arriving).lines == [(2, b"two")]
    os.write(pipe[1], b"three")
    os.close(pipe[1])
    assert next(arriving).lines == [(3, b"three")]
    assert list(arriving) == []


def test_what_nobody_takes_is_not_read(pipe: tuple[int, int]) -> None:
    written = 0

    def write() -> None:
        nonlocal written
        while True:
            try:
                written += os.write(pipe[1], b"x\n" * 32_768)
            except OSError:
                return

    arriving = chunks(pipe[0], rows=10, seconds=60)
    threading.Thread(target=write, daemon=True).start()
    next(arriving)
    before = -1
    while before != written:
        before = written
        threading.Event().wait(0.2)
    assert written < 4 * 2**20


def test_an_endless_line_is_an_error(pipe: tuple[int, int]) -> None:
    threading.Thread(target=os.write, args=(pipe[1], b"x" * 200_000), daemon=True).start()
    with pytest.raises(CandleFileError, match="line 1 is longer than"):
        next(chunks(pipe[0]))


# -- forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "amount"),
    [
        ({"timestamp": FIRST, "open": 1, "high": 3, "low": 0.5, "close": 2, "volume": 10}, 16.25),
        ({"Date": "2023-11-15T00:00:00Z", "O": "1", "H": "3", "L": "0.5", "C": "2", "V": "10", "amount": 15}, 15),
        ({"t": "2023-11-15T00:00:00Z", "o": 1, "h": 3, "l": 0.5, "c": 2, "v": 10, "n": 4, "vw": 1.75}, 17.5),
        ([FIRST, *CELLS], 16.25),
        ([FIRST, *CELLS, 14], 14),
        ([FIRST, "1.0", "3.0", "0.5", "2.0", "10.0", FIRST + HOUR - 1, "12.5", 4, "5", "6", "0"], 12.5),
        ([FIRST // 1000, *CELLS], 16.25),
    ],
)
def test_every_form_of_json_line_means_the_same_candle(line: object, amount: float) -> None:
    parts, bad = Reader("x", "BTC", "1h").read(lines_of(json.dumps(line)))
    part = only(parts)
    assert (part.symbol, part.interval, part.timestamps.tolist(), bad) == ("BTC", "1h", [FIRST], [])
    assert part.candles.tolist() == [[*CELLS, amount]]


def test_json_numbers_keep_their_last_digit() -> None:
    price = 1.2345678901234567
    part = only(Reader("x", "BTC").read(lines_of(json.dumps([FIRST, price, price, price, price, 1])))[0])
    assert part.candles[0, 0] == price


def test_lines_may_name_symbol_and_interval() -> None:
    named = {"timestamp": FIRST, "open": 1, "high": 3, "low": 0.5, "close": 2, "symbol": "ETH/USDT", "interval": "4h"}
    plain = {name: value for name, value in named.items() if name not in ("symbol", "interval")}
    parts, _ = Reader("x", "BTC", "1h").read(lines_of(json.dumps(named), json.dumps(plain)))
    assert [(part.symbol, part.interval) for part in parts] == [("ETH/USDT", "4h"), ("BTC", "1h")]
    with pytest.raises(CandleFileError, match="x line 2 names no symbol: --symbol does"):
        Reader("x").read(lines_of(json.dumps(named), json.dumps(plain)))


def test_a_csv_with_a_symbol_column_is_several_series() -> None:
    reader = Reader("x")
    reader.read(lines_of("\ufeffsymbol,Date,Open,High,Low,Close,Volume"))
    later = [Line(2, b"A,2024-01-02,1,3,0.5,2,10"), Line(3, b"B,2024-01-02,1,3,0.5,2,9")]
    parts, bad = reader.read([*later, Line(5, b"A,2024-01-01,1,3,0.5,2,10\r")])
    assert bad == []
    assert [(part.symbol, part.lines.tolist()) for part in parts] == [("A", [5, 2]), ("B", [3])]
    assert parts[0].candles[0, :AMOUNT].tolist() == CELLS


def test_the_header_of_yfinance_is_understood_in_every_chunk() -> None:
    header = ["Price,Close,High,Low,Open,Volume", "Ticker,AAPL,AAPL,AAPL,AAPL,AAPL", "Date,,,,,"]
    reader = Reader("x", "AAPL")
    first = only(reader.read(lines_of(*header, "2024-01-02,2,3,0.5,1,10"))[0])
    second = only(reader.read([Line(5, b"2024-01-03,2,3,0.5,1,10")])[0])
    assert first.candles[0, :AMOUNT].tolist() == second.candles[0, :AMOUNT].tolist() == CELLS


def test_of_lines_with_one_timestamp_the_last_counts() -> None:
    rows = [[FIRST, 1, 3, 0.5, 2, volume] for volume in (1, 2, 3)]
    part = only(Reader("x", "BTC").read(lines_of(*map(json.dumps, rows)))[0])
    assert (part.lines.tolist(), part.candles[0, 4]) == ([3], 3)


@pytest.mark.parametrize(
    ("header", "line", "reason"),
    [
        (None, "{", "is not JSON"),
        (None, "[1, 2]", "is no row of 6, 7 or 12 values"),
        (None, "7", "is no object and no row"),
        (None, json.dumps([1, *CELLS]), "has no timestamp between 1980 and 2100"),
        (None, json.dumps([FIRST, 1, 0.5, 0.5, 1, 1]), "has a high below its other prices"),
        ("date,open,high,low,close", "2024-01-01,1,3,0.5,null", "holds a value that is not a finite number"),
        ("date,open,high,low,close", "2024-01-01,1,3,0.5,2,7", "has more cells than the header has names"),
        ("date,open,high,low,close", '2024-01-01,"1,3,0.5,2', "has a quote that is not closed"),
    ],
)
def test_a_line_that_is_no_candle_says_why_and_spoils_no_other(header: str | None, line: str, reason: str) -> None:
    good = "2024-01-02,1,3,0.5,2" if header else json.dumps([FIRST + HOUR, *CELLS])
    parts, bad = Reader("x", "BTC").read(lines_of(*([header] if header else [good]), line, good))
    assert bad == [(2, reason)]
    assert only(parts).lines[-1] == 3


def test_what_is_no_table_of_candles_is_refused() -> None:
    with pytest.raises(CandleFileError, match=r"x has no timestamp column; it has 1\.0, 3\.0"):
        Reader("x", "BTC").read(lines_of("1.0,3.0", "1.0,3.0"))


def test_a_chunk_fits_into_one_request() -> None:
    from feeds.put import PUT_ROWS

    assert CHUNK_ROWS * 2 <= PUT_ROWS
    assert Chunk([], 0).lines == []
