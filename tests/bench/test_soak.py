"""What the service holds does not grow with the number of requests."""

from itertools import islice
from pathlib import Path

import pytest

from bench.soak import mixed_bodies, soak


def test_no_two_requests_of_a_soak_are_equal() -> None:
    bodies = list(islice(mixed_bodies(), 500))
    assert len(set(bodies)) == 500


@pytest.mark.long
def test_nothing_that_the_service_holds_grows_over_four_thousand_mixed_requests(tmp_path: Path) -> None:
    laps = soak(tmp_path, 4_000, every=500)
    assert len(laps) == 8
    assert laps[-1].resident_mb < 1.05 * laps[1].resident_mb, laps
    for name in ("descriptors", "threads", "tasks", "series"):  # one look may meet a connection that is being closed
        pooled = name == "descriptors"  # Redis gets one more connection when more commands meet than ever before
        assert min(getattr(lap, name) for lap in laps[-3:]) <= getattr(laps[1], name) + pooled, (name, laps)
