"""Memory does not grow with the number of requests."""

from itertools import islice
from pathlib import Path

import pytest

from bench.soak import mixed_bodies, soak


def test_no_two_requests_of_a_soak_are_equal() -> None:
    bodies = list(islice(mixed_bodies(), 500))
    assert len(set(bodies)) == 500


@pytest.mark.long
def test_resident_memory_is_flat_over_ten_thousand_mixed_requests(tmp_path: Path) -> None:
    sizes = soak(tmp_path, 10_000)
    assert len(sizes) == 10
    assert sizes[-1] < 1.05 * sizes[1], sizes
