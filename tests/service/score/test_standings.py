"""Scores of a window of blocks."""

import numpy as np
import pytest

from service.score.ledger import SUMS
from service.score.standings import related_blocks, scores


def sums(relative: float, blocks: int = 40) -> np.ndarray:
    found = np.zeros(blocks, SUMS)
    naive = np.random.default_rng(0).uniform(0.5, 1.5, blocks)
    found["count"], found["naive_error"], found["error"] = 24, naive, relative * naive
    return found


@pytest.mark.parametrize(("relative", "worse"), [(0.9, False), (1.0, False), (1 + 1e-8, False), (1.01, True)])
def test_only_what_rounding_cannot_do_is_worse_than_naive(relative: float, worse: bool) -> None:
    found = scores(sums(relative), 2)
    assert found is not None
    assert found.relative_mae == pytest.approx(relative)
    assert found.is_worse_than_naive is worse


def test_too_few_blocks_have_no_interval_and_are_not_called_worse() -> None:
    found = scores(sums(2.0, blocks=7), 2)
    assert found is not None
    assert (found.low, found.high, found.is_worse_than_naive) == (None, None, False)
    assert scores(sums(1.0)[:0], 2) is None


@pytest.mark.parametrize(
    ("calendar", "interval", "expected"),
    [("24/7", "1h", [2, 2, 2]), ("24/5", "1h", [2, 3, 3]), ("XNYS", "1d", [2, 3, 3]), ("XNYS", "1h", [3, 7, 7])],
)
def test_forecasts_reach_over_more_blocks_where_markets_pause(
    calendar: str, interval: str, expected: list[int]
) -> None:
    assert [related_blocks(calendar, interval, group) for group in range(3)] == expected
