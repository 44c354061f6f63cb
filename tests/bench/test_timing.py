"""The harness on a clock that only the work moves: order, repeats, budget, ratio."""

import numpy as np
import pytest

from bench.timing import median_of, race


class Bench:
    """Work that takes what it says, and a clock that knows nothing else."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def work(self, name, *seconds):
        left = list(seconds)

        def run():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def stopwatch(self, work):
        begun = self.now
        work()
        return self.now - begun

    def race(self, sides, seconds, **options):
        return race(sides, seconds=seconds, stopwatch=self.stopwatch, clock=lambda: self.now, **options)


@pytest.fixture
def bench():
    return Bench()


def test_sides_alternate_who_goes_first(bench):
    bench.race({"a": bench.work("a", 1.0), "b": bench.work("b", 1.0)}, 0, at_least=4)
    assert bench.calls[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_first_calls_are_not_counted(bench):
    found = bench.race({"a": bench.work("a", 100.0, 2.0), "b": bench.work("b", 50.0, 1.0)}, 0)
    assert found.seconds == {"a": (2.0,) * 3, "b": (1.0,) * 3}


def test_a_fast_side_runs_more_often_in_its_turn_but_not_without_bound(bench):
    bench.race({"slow": bench.work("slow", 4.0), "fast": bench.work("fast", 1.0)}, 0, at_least=1)
    assert bench.calls[2:] == ["slow", "fast", "fast", "fast", "fast"]
    bench.calls.clear()
    bench.race({"slow": bench.work("slow", 1000.0), "fast": bench.work("fast", 1.0)}, 0, at_least=1)
    assert bench.calls[2:].count("fast") == 8


def test_a_short_first_call_is_warmed_up_twice(bench):
    bench.race({"a": bench.work("a", 0.5)}, 0, at_least=1)
    assert bench.calls == ["a", "a", "a"]


def test_rounds_end_with_the_time(bench):
    found = bench.race({"a": bench.work("a", 1.0), "b": bench.work("b", 1.0)}, 10, at_least=1)
    assert found.rounds == 5


def test_a_slow_side_still_gets_its_rounds(bench):
    assert bench.race({"a": bench.work("a", 60.0)}, 10, at_least=3).rounds == 3


def test_a_replaced_warm_up_is_the_only_untimed_call(bench):
    sides = {"slow": bench.work("slow", 100.0), "fast": bench.work("fast", 1.0)}
    bench.race(sides, 0, at_least=1, warm_up={"slow": bench.work("short", 1.0)})
    assert bench.calls.count("slow") == 1
    assert bench.calls[0] == "short"


def test_ratio_is_that_of_rounds_and_survives_a_machine_that_slows_down(bench):
    sides = {"a": bench.work("a", 1, 3, 30, 3), "b": bench.work("b", 1, 1, 10, 1)}
    ratio = bench.race(sides, 0, at_least=3).ratio("a", "b")
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((3, 3, 3))


def test_interval_covers_the_median_and_shrinks_with_rounds():
    draws = np.random.default_rng(3).lognormal(0, 0.5, 400)
    few, many = median_of(draws[:10]), median_of(draws)
    assert many.low < 1 < many.high
    assert many.high - many.low < few.high - few.low


def test_interval_of_one_round_is_that_round():
    assert median_of(np.array([7.0])).low == median_of(np.array([7.0])).high == 7
