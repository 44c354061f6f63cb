"""The drift alarm over simulated years: silent while nothing changes, whatever markets do; prompt when errors rise."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from model_store.manifest import Baseline
from models import scoring
from models.candles import Floats
from service.score.drift import (
    SYMBOL_ALARM,
    Drift,
    Losses,
    baseline_for,
    cumulative,
    drift_of_model,
    drift_of_symbol,
    losses,
)
from service.score.ledger import SUMS, Blocks

HOURS, HORIZON, WARM_UP = 90 * 24, 24, 500
STREAMS = 400


@dataclass(frozen=True)
class Errors:
    """What a series' forecasts were worth: |error|, |naive error| and scale `[T, H]` by origin."""

    model: Floats
    naive: Floats
    scale: Floats

    def blocks(self, group: int, first: int, last: int) -> Blocks:
        """Sums as the ledger keeps them, of targets from `first` to `last`."""
        steps = scoring.steps_of(group, HORIZON)
        near = slice(max(0, first - HORIZON), last)  # the origins that such targets can have
        model, naive, scale = (values[near, steps] for values in (self.model, self.naive, self.scale))
        origins = np.arange(len(self.model))[near, None]
        targets = origins + np.arange(1, HORIZON + 1)[None, steps]
        inside = (targets >= first) & (targets < last)
        number = targets // scoring.block_length(group)
        rows = {
            "count": np.ones(targets.shape),
            "scaled_error": model / scale,
            "scaled_naive_error": naive / scale,
            "error": model,
            "naive_error": naive,
        }
        numbers = number[inside]
        found = np.unique(numbers)
        sums = np.zeros(len(found), SUMS)
        for name, values in rows.items():
            sums[name] = np.bincount(numbers, values[inside])[found]
        return Blocks(found, sums)


def garch(rng: np.random.Generator, count: int) -> Floats:
    """Hourly log-returns whose volatility clusters: GARCH(1, 1) with Student-t shocks of 5 degrees of freedom."""
    shocks = rng.standard_t(5, count) / np.sqrt(5 / 3)
    variance, found = 1.0, np.empty(count)
    for t, shock in enumerate(shocks.tolist()):
        found[t] = shock * variance**0.5
        variance = 0.02 + 0.08 * found[t] ** 2 + 0.9 * variance
    return found * 0.005


@cache  # the same markets for every change
def market(seed: int) -> tuple[Floats, Floats]:
    """Log-returns, and at each origin an opinion of what comes, which changes slowly."""
    rng = np.random.default_rng(seed)
    returns = garch(rng, WARM_UP + 2 * HOURS + HORIZON)
    opinion = np.empty(2 * HOURS)
    level = 0.0
    for t, shock in enumerate(rng.normal(size=2 * HOURS).tolist()):
        level = 0.9 * level + 0.19**0.5 * shock
        opinion[t] = level
    return returns, opinion


def stream(seed: int, *, wilder: float = 1.0, worse: float = 1.0) -> Errors:
    """Two quarters of hourly forecasts; in the second the market is `wilder` and the model's error `worse`."""
    calm, opinion = market(seed)
    returns = calm.copy()
    returns[WARM_UP + HOURS :] *= wilder
    volatility = scoring.ewma_volatility(returns, scoring.SCALE_DECAY)
    scale = scoring.walk_sigma(volatility[WARM_UP:-HORIZON], HORIZON)
    path = np.concatenate([[0.0], np.cumsum(returns)])
    origins = np.arange(WARM_UP, len(returns) - HORIZON)
    naive = path[origins[:, None] + 1 + np.arange(1, HORIZON + 1)] - path[origins + 1][:, None]
    # A forecast is the last close and an opinion. Opinions of a fifth of the volatility make errors 2 % larger than
    # the naive ones; larger ones make them worse.
    usual = 0.2
    size = np.full(len(origins), usual)
    size[HOURS:] = np.sqrt(worse**2 * (1 + usual**2) - 1)
    model = naive - (opinion * size)[:, None] * scale
    return Errors(np.abs(model), np.abs(naive), scale)


def baseline_of(blocks: Blocks, group: int) -> Baseline:
    """As training makes it."""
    sums = blocks.sums
    rho0 = float(sums["error"].sum() / sums["naive_error"].sum())
    means = (sums["scaled_error"] - scoring.MARGIN * rho0 * sums["scaled_naive_error"]) / sums["count"]
    return Baseline(
        symbol="X",
        interval="1h",
        group=group,
        horizon=min(HORIZON, scoring.GROUPS[group]),
        n_blocks=len(means),
        mae_log_return=1,
        naive_mae_log_return=1,
        rho0=rho0,
        sd_block=float(means.std(ddof=1)),
        coverage_80=0.8,
        pinball={},
    )


@cache  # both groups of steps, or the stream would be made twice
def delays(seed: int, wilder: float, worse: float) -> tuple[int | None, ...]:
    """For each of two groups, in how many blocks after the change the alarm is raised; None where it is not."""
    errors = stream(seed, wilder=wilder, worse=worse)
    return tuple(delay(errors, group) for group in (0, 1))


def delay(errors: Errors, group: int) -> int | None:
    baseline = baseline_of(errors.blocks(group, 0, HOURS), group)
    z = losses(errors.blocks(group, HOURS, 2 * HOURS), baseline, sealed=10**9).z
    raised = np.flatnonzero(cumulative(z) > SYMBOL_ALARM)
    return int(raised[0]) + 1 if len(raised) else None


def alarms(group: int, *, count: int = STREAMS, wilder: float = 1.0, worse: float = 1.0) -> list[int | None]:
    """The delays of the first `count` streams."""
    return [delays(seed, wilder, worse)[group] for seed in range(count)]


@pytest.mark.long
@pytest.mark.parametrize("group", [0, 1])
def test_the_alarm_is_silent_while_nothing_changes_and_when_markets_become_wilder(group: int) -> None:
    calm = sum(each is not None for each in alarms(group))
    wild = sum(each is not None for each in alarms(group, wilder=2.0))
    assert calm <= 0.02 * STREAMS
    assert abs(wild - calm) <= 0.01 * STREAMS


@pytest.mark.parametrize("group", [pytest.param(0, marks=pytest.mark.long), 1])
def test_errors_that_rise_by_27_percent_are_found_within_two_weeks(group: int) -> None:
    found = [each for each in alarms(group, worse=1.27) if each is not None]
    assert len(found) >= 0.95 * STREAMS
    assert np.median(found) <= 14


def judged(z: list[float], **changes: float) -> Drift:
    found = Losses(np.arange(len(z)), np.array(z), naive=1.0)
    base = {"n_blocks": 90, "rho0": 1.0, "sd_block": 0.1, "mae_log_return": 1, "naive_mae_log_return": 1}
    fields = base | {"coverage_80": 0.8, "pinball": {}, "symbol": "X", "interval": "1h", "group": 0, "horizon": 8}
    return drift_of_symbol(found, Baseline(**(fields | changes)), "1h", 0)


def test_states_rise_with_the_sum_and_an_alarm_ends_only_after_five_better_blocks() -> None:
    assert judged([0.0] * 10).state == "ok"
    assert judged([3.0] * 3).state == "warn"
    high = [4.0] * 5
    assert judged(high).state == "alarm"
    falling = [*high, *[-4.0] * 4]
    assert judged(falling).state == "alarm"  # the sum is small, but not for long enough
    assert judged([*falling, -4.0]).state == "ok"
    assert judged([*falling, 1.0, -4.0]).state == "alarm"


def test_too_few_blocks_or_a_short_baseline_say_so() -> None:
    assert judged([4.0, 4.0]).state == "insufficient"
    assert drift_of_symbol(None, None, "1h", 0).state == "no_baseline"
    short = Baseline.model_validate(baseline_of(stream(0).blocks(0, 0, HOURS), 0).model_dump() | {"n_blocks": 29})
    assert baseline_for([short], "X", "1h", 0) is None


def test_a_symbols_own_baseline_comes_before_that_of_all_symbols() -> None:
    own = baseline_of(stream(0).blocks(0, 0, HOURS), 0)
    of_all = own.model_copy(update={"symbol": "*"})
    assert baseline_for([of_all, own], "X", "1h", 0) == own
    assert baseline_for([of_all, own], "Y", "1h", 0) == of_all
    assert baseline_for([of_all, own], "X", "1d", 0) is None
    assert baseline_for([of_all, own], "X", "1h", 1) is None


def test_the_delay_to_expect_is_about_the_delay_that_is_found() -> None:
    errors = stream(1)
    baseline = baseline_of(errors.blocks(0, 0, HOURS), 0)
    live = losses(errors.blocks(0, HOURS, 2 * HOURS), baseline, sealed=10**9)
    expected = drift_of_symbol(live, baseline, "1h", 0).delay_days
    found = [each for each in alarms(0, count=100, worse=1.25) if each is not None]
    assert expected == pytest.approx(np.median(found), rel=0.6)


def test_all_symbols_together_are_sooner_sure_than_one() -> None:
    own = [baseline_of(stream(seed).blocks(0, 0, HOURS), 0) for seed in range(12)]
    means = {name: float(np.mean([getattr(each, name) for each in own])) for name in ("rho0", "sd_block")}
    baseline = own[0].model_copy(update={"symbol": "*", "correlation": 0.1, **means})

    def found(worse: float) -> tuple[Drift, list[Drift]]:
        each = [stream(seed, worse=worse).blocks(0, HOURS, 2 * HOURS) for seed in range(12)]
        symbols = [losses(blocks, baseline, sealed=10**9) for blocks in each]
        return drift_of_model(symbols, baseline, "1h", 0), [drift_of_symbol(x, baseline, "1h", 0) for x in symbols]

    together, alone = found(1.04)
    assert together.state == "alarm"
    assert sum(each.state == "alarm" for each in alone) < 6
    assert found(1.0)[0].state == "ok"


def test_a_block_that_is_still_filling_says_nothing_yet() -> None:
    errors = stream(0)
    baseline = baseline_of(errors.blocks(0, 0, HOURS), 0)
    blocks = errors.blocks(0, HOURS, 2 * HOURS)
    assert len(losses(blocks, baseline, sealed=int(blocks.numbers[-1])).z) == len(blocks.numbers) - 1
