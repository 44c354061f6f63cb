"""The search itself, on losses that are made up: what is kept, what is counted, what is the same again."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from models.candles import Floats
from training.recipe import Knob
from training.search import GENERATION, Found, Runner, Settings, Task, Tried, check_decidable, decide, find_better

HORIZON, STRIDE, PIECES = 10, 2, 4
SPACE = {"knob": Knob(low=0.0, high=1.0)}
CANDLES = {"search": 12 * HORIZON, "decision": 8 * HORIZON}

optuna.logging.set_verbosity(optuna.logging.WARNING)


def windows_of(daily: Floats) -> Floats:
    """Mean loss of every window: neighbours share candles, as forecasts of several steps do."""
    return daily[np.arange(0, len(daily) - HORIZON, STRIDE)[:, None] + np.arange(HORIZON)].mean(axis=1)


def scorer(seed: int, gain: Callable[[Settings], float] = lambda _: 0.0) -> Runner:
    """Losses that settings change by chance, and by their `gain`."""
    rng = np.random.default_rng(seed)
    market = {name: 1 + 0.3 * rng.random(candles + HORIZON) for name, candles in CANDLES.items()}

    def score(task: Task) -> Tried:
        daily = market[task.windows] + 0.2 * rng.normal(size=len(market[task.windows])) - gain(task.settings)
        losses = windows_of(daily)
        scores: dict[int, float] = {}
        for piece in range(1, PIECES + 1):
            scores[piece] = float(losses[np.arange(len(losses)) % PIECES < piece].mean())
            if piece <= len(task.bars) and scores[piece] > task.bars[piece - 1]:
                return Tried(scores, pruned=True)
        return Tried(scores, losses=losses, positions=np.arange(len(losses)) * STRIDE)

    return lambda tasks: map(score, tasks)


def search(run: Runner, trials: int = 9, study: optuna.Study | None = None, seed: int = 0) -> Found:
    return find_better(study or optuna.create_study(), SPACE, run, trials, horizon=HORIZON, seed=seed)


def test_noise_keeps_nothing_in_95_of_100_searches() -> None:
    """The best of nine looks better where it was searched, nearly always; on windows it never saw it is not."""
    found = [search(scorer(seed), seed=seed) for seed in range(100)]
    assert sum(each.decision is not None for each in found) >= 80
    assert sum(each.winner is not None for each in found) <= 5


def test_a_real_improvement_is_kept() -> None:
    found = search(scorer(1, lambda settings: 0.3 * settings.get("knob", 0.0)), trials=16)  # type: ignore[operator]
    assert found.winner is not None
    assert found.decision is not None
    assert found.winner["knob"] > 0.7  # type: ignore[operator]
    assert 0 < found.decision.low < found.decision.gain < found.decision.high


def test_few_blocks_of_overlapping_forecasts_prove_nothing_by_their_bootstrap_alone() -> None:
    """A rival without an edge is kept at most as often as 5 % allows, where the interval alone keeps it more often."""
    rng, by_interval, kept = np.random.default_rng(0), 0, 0
    positions = np.arange(0, 6 * HORIZON, STRIDE)
    for _ in range(200):
        one, two = (
            Tried({1: 0.0}, losses=windows_of(1 + rng.random(7 * HORIZON)), positions=positions) for _ in range(2)
        )
        decision = decide(one, two, horizon=HORIZON)
        by_interval += decision.low > 0
        kept += decision.kept
    assert kept <= 10 < by_interval


def test_only_the_winner_sees_the_decision_windows_and_only_once() -> None:
    seen: list[Task] = []
    inner = scorer(1, lambda settings: 0.3 * settings.get("knob", 0.0))  # type: ignore[operator]

    def run(tasks: Sequence[Task]) -> Iterator[Tried]:
        seen.extend(tasks)
        return iter(list(inner(tasks)))

    study = optuna.create_study()
    found = search(run, study=study)
    late = [task.settings for task in seen if task.windows == "decision"]
    assert found.best is not None
    assert late == [{}, found.best.params]
    assert seen[-1].windows == "decision"
    before = len(seen)
    again = search(run, trials=30, study=study)  # more trials would be another look at the same windows
    assert len(seen) == before
    assert again.decision == found.decision
    assert len(again.trials) == len(found.trials)


class Killed(BaseException):
    """As by a signal."""


def opened(path: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(storage=storage, study_name="search", load_if_exists=True)


def by_settings(task: Task) -> Tried:
    """The same settings, the same losses, in any process."""
    knob = float(task.settings.get("knob", 0.4))
    losses = windows_of(2 + np.sin(np.arange(9 * HORIZON) + 40 * knob) - knob)
    return Tried({1: float(losses[::2].mean()), 2: float(losses.mean())}, False, losses, np.arange(len(losses)) * 2)


def told(found: Found) -> list[object]:
    return [(trial.params, trial.value, trial.state) for trial in found.trials]


@pytest.mark.parametrize("killed_at", [3, GENERATION + 1])
def test_a_killed_search_goes_on_and_counts_no_trial_twice(tmp_path: Path, killed_at: int) -> None:
    whole = search(lambda tasks: map(by_settings, tasks), trials=11, study=opened(tmp_path / "whole"))
    ran: list[Settings] = []

    def fragile(tasks: Sequence[Task]) -> Iterator[Tried]:
        for task in tasks:
            if len(ran) == killed_at + 1:  # the current settings come first
                raise Killed
            ran.append(task.settings)
            yield by_settings(task)

    with pytest.raises(Killed):
        search(fragile, trials=11, study=opened(tmp_path / "killed"))
    started = len(ran)

    def going_on(tasks: Sequence[Task]) -> Iterator[Tried]:
        for task in tasks:
            ran.append(task.settings)
            yield by_settings(task)

    found = search(going_on, trials=11, study=opened(tmp_path / "killed"))
    assert len(found.trials) == 11
    assert len(ran) - started == 11 - killed_at + 2  # two for the decision
    assert told(found) == told(whole)
    assert found.decision == whole.decision


def test_trials_worse_than_the_median_end_early_and_none_of_the_first_generation_does() -> None:
    found = search(scorer(2, lambda settings: 0.5 * settings.get("knob", 0.5)), trials=32)  # type: ignore[operator]
    states = [trial.state for trial in found.trials]
    assert TrialState.PRUNED not in states[:GENERATION]
    ended = [trial for trial in found.trials if trial.state == TrialState.PRUNED]
    assert ended
    assert max(max(trial.intermediate_values) for trial in ended) < PIECES


def test_a_search_in_which_the_current_settings_are_best_tests_nothing() -> None:
    found = search(scorer(3, lambda settings: -1.0 if settings else 0.0))
    assert found.decision is None
    assert found.winner is None


def test_windows_that_decide_nothing_are_refused_with_the_horizon_that_would_do() -> None:
    with pytest.raises(ValueError, match=r"within 86 candles: .* 64 steps .*horizon be 17 or less"):
        check_decidable(np.arange(86), 64)
    check_decidable(np.arange(86), 17)
