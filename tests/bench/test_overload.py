"""What is told of an overload: counted from the records of both clients."""

import math

from bench.load import Record
from bench.overload import Overload


def record(due: float, latency: float, status: int = 200, retry_after: str | None = None) -> Record:
    return Record(due, due, due + latency, status, b"", retry_after)


def seen(*, flood: list[Record], other: list[Record]) -> Overload:
    return Overload(
        capacity=2.0, deadline=1.0, seconds=10.0, flood=flood, other=other, resident_mb=(1, 1), client_cores=0.1
    )


def test_only_what_comes_in_time_counts_as_answered() -> None:
    flood = [record(1, 0.5), record(2, 1.5), record(3, 0.1, 504), record(4, 0.1, 503, "1")]
    found = seen(flood=flood, other=[record(-1, 0.2), record(5, 0.2), record(12, 0.2)])
    assert found.goodput == 2 / 10 / 2
    assert [each.due for each in found.meanwhile] == [5]


def test_refusals_without_retry_after_and_broken_connections_are_unforeseen() -> None:
    flood = [record(1, 0.1, 503, "1"), record(1, 0.1, 503), record(1, 0.1, 0), record(1, 0.1, 500), record(1, 2, 504)]
    found = seen(flood=flood, other=[])
    assert found.unforeseen == 3
    assert len(found.refused) == 2


def test_it_has_recovered_once_an_answer_is_as_fast_as_before() -> None:
    other = [record(-2, 0.3), record(-1, 0.2), record(10.5, 0.9), record(11, 0.1, 503, "1"), record(12, 0.25)]
    assert seen(flood=[], other=other).recovery == 2.25
    assert seen(flood=[], other=other[:4]).recovery == math.inf
