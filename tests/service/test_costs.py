"""Predictions of what a batch takes: they may err towards too little, never towards refusing for ever."""

import time

import pytest

from service.engine.costs import Costs


def test_ignorance_predicts_nothing() -> None:
    costs = Costs()
    costs.record("other", 4, 3.0)
    assert costs.predict("mine", 4) == 0


def test_sizes_between_are_interpolated_and_beyond_the_largest_constant() -> None:
    costs = Costs()
    costs.record("b", 4, 1.0)
    costs.record("b", 8, 3.0)
    assert [costs.predict("b", rows) for rows in (0, 2, 4, 6, 8, 32)] == [0, 0.5, 1, 2, 3, 3]


def test_a_slow_batch_moves_the_prediction_more_than_a_fast_one() -> None:
    costs = Costs()
    costs.record("b", 4, 1.0)
    costs.record("b", 4, 2.0)
    assert costs.predict("b", 4) == pytest.approx(1.4)
    costs.record("b", 4, 1.0)
    assert costs.predict("b", 4) == pytest.approx(1.36)


def test_the_first_slow_batch_is_forgotten_as_a_warm_up() -> None:
    costs = Costs()
    costs.record("b", 4, 30.0)
    costs.record("b", 4, 0.1)
    assert costs.predict("b", 4) == 0.1


def test_a_batch_that_was_given_up_took_at_least_so_long() -> None:
    costs = Costs()
    costs.record("b", 4, 2.0, ended=False)
    assert costs.predict("b", 4) == 2
    costs.record("b", 4, 0.5, ended=False)
    assert costs.predict("b", 4) == 2


def test_a_size_that_is_tried_no_more_becomes_cheaper_with_the_others() -> None:
    costs = Costs()
    for rows, seconds in ((1, 6.0), (8, 30.0), (4, 6.5), (4, 2.0)):
        costs.record("b", rows, seconds)
    assert [costs.predict("b", rows) for rows in (1, 4, 8)] == [2, 2, 4]


def test_old_measurements_refuse_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs()
    costs.record("b", 4, 30.0)
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert costs.predict("b", 4) == 0
