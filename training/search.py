"""A search over settings, and the one test that its winner must pass on windows the search never saw."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from models import scoring
from models.candles import Floats
from training.recipe import Knob, Value

GENERATION: Final = 8  # trials that are asked for at once: what they are must not depend on how many run at a time
_CURRENT, _DECISION, _BARS = "current", "decision", "bars"  # attributes of the study, and of a trial
_FINISHED: Final = (TrialState.COMPLETE, TrialState.PRUNED)

Settings = Mapping[str, Value]


def in_words(settings: Settings) -> str:
    """Such as `phases.network.steps 600, serving.top_p 0.93`."""
    return ", ".join(f"{name} {told(value)}" for name, value in settings.items())


def told(value: Value) -> str:
    """A setting's value."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Task:
    """Settings to be scored; none of them are the current ones. Plain data, which may go to another process."""

    settings: Settings
    windows: Literal["search", "decision"] = "search"
    bars: Sequence[float] = ()  # after piece k the mean loss must not lie above the k-th


@dataclass(frozen=True, eq=False)
class Tried:
    """What came of a task."""

    scores: Mapping[int, float]  # mean loss after each piece, from 1 on
    pruned: bool = False  # it ended early
    losses: Floats = field(default_factory=lambda: np.empty(0))  # [N] of the windows, where it did not
    positions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [N] in the time grid

    @property
    def score(self) -> float:
        return self.scores[max(self.scores)]


Runner = Callable[[Sequence[Task]], Iterable[Tried]]  # in the tasks' order


@dataclass(frozen=True)
class Decision:
    """What the winner gains on the decision windows: 1 − its loss / the current settings'."""

    gain: float
    low: float
    high: float
    confidence: float
    p_value: float
    windows: int

    @property
    def kept(self) -> bool:
        """The interval lies above zero, and the test for few overlapping forecasts agrees."""
        return self.low > 0 and self.p_value < 1 - self.confidence

    def __str__(self) -> str:
        return (
            f"on {self.windows} windows that the search never saw it gains {self.gain:+.2%}, {self.confidence:.4g}"
            f" interval [{self.low:+.2%}, {self.high:+.2%}], p = {self.p_value:.3f}"
        )


@dataclass(frozen=True)
class Found:
    """A finished search. Without a decision none of its trials was better than the current settings."""

    current: Mapping[int, float]  # mean loss of the current settings after each piece of the search windows
    trials: Sequence[FrozenTrial]
    best: FrozenTrial | None  # of those that did not end early
    decision: Decision | None

    @property
    def leads(self) -> bool:
        """Whether the best trial was better than the current settings where it was searched."""
        return self.best is not None and self.gain(self.best) > 0

    def gain(self, trial: FrozenTrial) -> float:
        """1 − its loss / the current settings', after the last piece that it has seen; NaN where it has seen none."""
        values = trial.intermediate_values
        last = max(values, default=0)
        return 1 - values[last] / self.current[last] if last in self.current else math.nan

    @property
    def winner(self) -> Settings | None:
        """Settings that are better beyond chance."""
        return self.best.params if self.best and self.decision and self.decision.kept else None


def find_better(
    study: optuna.Study,
    space: Mapping[str, Knob],
    run: Runner,
    trials: int,
    *,
    horizon: int,
    confidence: float = 0.95,
    seed: int = 0,
    first: Sequence[Settings] = (),
    progress: Callable[[int, str], None] | None = None,
) -> Found:
    """Search `space` until the study has `trials` finished trials, then test the best of them, and it alone.

    A study of earlier gets what it lacks: a trial that was cut short is run again with the same settings, and is
    counted once. Once its winner has been tested it gets no more: a second look at the same windows would be another
    test. Trials come in generations, so that their settings and scores depend on `seed` alone; `first` are tried first.
    """
    if _DECISION in study.user_attrs:
        return _found(study)
    distributions = {name: _distribution(knob) for name, knob in space.items()}
    if _CURRENT not in study.user_attrs:
        for settings in first:
            study.enqueue_trial(dict(settings), skip_if_exists=True)
        [current] = run([Task({})])
        study.set_user_attr(_CURRENT, dict(current.scores))
    for cut in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(cut.number, state=TrialState.FAIL)
        study.enqueue_trial(cut.params, user_attrs=cut.user_attrs)
    while (done := len(_finished(study))) < trials:
        asked = _ask(study, distributions, min(GENERATION - done % GENERATION, trials - done), done, seed)
        tasks = [Task(trial.params, bars=trial.user_attrs[_BARS]) for trial in asked]
        for trial, tried in zip(asked, run(tasks), strict=True):
            _tell(study, trial, tried)
            done += 1
            if progress:
                progress(done, _line(study, tried))
    found = _found(study)
    if found.best and found.leads:
        before, after = run([Task({}, "decision"), Task(found.best.params, "decision")])
        decision = decide(after, before, horizon=horizon, confidence=confidence, seed=seed)
        study.set_user_attr(_DECISION, asdict(decision))
    return _found(study)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=_FINISHED)


def _line(study: optuna.Study, tried: Tried) -> str:
    found = _found(study)
    ended = ", the last ended early" if tried.pruned else ""
    return f"best {found.gain(found.best):+.2%}{ended}" if found.best else "no trial is whole yet"


def _ask(
    study: optuna.Study, distributions: dict[str, BaseDistribution], count: int, done: int, seed: int
) -> list[optuna.Trial]:
    """Trials of one generation: by the tree-structured Parzen estimator (Bergstra et al. 2011), at first at random."""
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=GENERATION, seed=seed + done)
    bars = _bars(study)
    asked = [study.ask(distributions) for _ in range(count)]
    for trial in asked:
        if _BARS not in trial.user_attrs:
            trial.set_user_attr(_BARS, bars)
    return asked


def _bars(study: optuna.Study) -> list[float]:
    """The median stopping rule (Golovin et al. 2017): after each piece but the last, the median of whole trials."""
    whole = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    pieces = max((max(trial.intermediate_values) for trial in whole), default=0)
    known = [[t.intermediate_values[k] for t in whole if k in t.intermediate_values] for k in range(1, pieces)]
    return [statistics.median(values) if values else math.inf for values in known]


def _tell(study: optuna.Study, trial: optuna.Trial, tried: Tried) -> None:
    for piece, score in tried.scores.items():
        trial.report(score, piece)
    if tried.pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, tried.score)


def _found(study: optuna.Study) -> Found:
    trials, decision = _finished(study), study.user_attrs.get(_DECISION)
    whole = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = min(whole, key=lambda trial: (trial.value, trial.number), default=None)
    current = {int(piece): score for piece, score in study.user_attrs[_CURRENT].items()}
    return Found(current, trials, best, Decision(**decision) if decision else None)


def decide(after: Tried, before: Tried, *, horizon: int, confidence: float = 0.95, seed: int = 0) -> Decision:
    """Whether losses on the very same windows, of forecasts `horizon` steps long, are lower beyond chance.

    The paired block bootstrap alone is not enough: where the windows make few blocks of overlapping forecasts its
    interval is too short. ValueError where they make too few even for the test of Diebold and Mariano.
    """
    times, place = np.unique(after.positions - after.positions.min(), return_inverse=True)
    counts = np.bincount(place)
    new, old = (np.bincount(place, each.losses) for each in (after, before))
    gains, losses = np.zeros((2, int(times[-1]) + 1))
    gains[times], losses[times] = old - new, old
    interval = scoring.block_bootstrap(gains, losses, block=horizon, seed=seed, confidence=confidence)
    test = scoring.diebold_mariano(new / counts, old / counts, overlap=_overlap(times, horizon))
    if interval is None or test is None:
        raise ValueError(_too_short(times, horizon))
    better = test.p_value if test.statistic < 0 else 1.0
    return Decision(float(gains.sum() / losses.sum()), *interval, confidence, better, len(after.losses))


def check_decidable(positions: NDArray[np.int64], horizon: int) -> None:
    """ValueError where windows at these positions are too few for `decide`."""
    times = np.unique(positions - positions.min())
    if times[-1] + 1 < scoring.MIN_BLOCKS * horizon or len(times) < scoring.MIN_BLOCKS * _overlap(times, horizon):
        raise ValueError(_too_short(times, horizon))


def _overlap(times: NDArray[np.int64], horizon: int) -> int:
    """How many times of origin in a row share targets, at most."""
    return int((np.searchsorted(times, times + horizon) - np.arange(len(times))).max())


def _too_short(times: NDArray[np.int64], horizon: int) -> str:
    return (
        f"the decision windows begin at {len(times)} times within {times[-1] + 1} candles: forecasts of {horizon} steps"
        f" decide nothing there; let the horizon be {(times[-1] + 1) // (scoring.MIN_BLOCKS + 1)} or less, the stride"
        " shorter or the val part longer"
    )


def _distribution(knob: Knob) -> BaseDistribution:
    if knob.low is None or knob.high is None:
        return CategoricalDistribution(knob.choices)
    if isinstance(knob.low, int) and isinstance(knob.high, int):
        return IntDistribution(knob.low, knob.high, log=knob.log)
    return FloatDistribution(knob.low, knob.high, log=knob.log)
