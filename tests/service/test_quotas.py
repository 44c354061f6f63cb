"""Quotas: the count in Redis and the one in memory are the same, and refuse for as long as they say."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.api.quotas import Count, Quotas
from service.keys import Quota
from service.metrics import Metrics
from service.state import State
from tests.service.conftest import Clock

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("patient")]

QUOTA = Quota(candles=100, seconds=60)
START = 1_750_000_000_000 // 60_000 * 60_000  # a window begins


METRICS = Metrics(CollectorRegistry())


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = State(None, tmp_path, METRICS)
    await state.start()
    yield state
    await state.stop()


steps = st.lists(st.tuples(st.integers(0, 70_000), st.integers(1, 120)), min_size=1, max_size=12)


async def test_redis_and_memory_count_alike(state: State) -> None:
    loop, clock, turns = asyncio.get_running_loop(), Clock(START), iter(range(10_000))
    ours, everybodys = Quotas(SimpleNamespace(up=False), clock, METRICS), Quotas(state, clock, METRICS)

    async def both(taken: list[tuple[int, int]]) -> None:
        client, clock.now = f"client{next(turns)}", START
        for passed, cost in taken:
            clock.now += passed
            assert await ours.spend(client, QUOTA, cost) == await everybodys.spend(client, QUOTA, cost)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(steps)
    def alike(taken: list[tuple[int, int]]) -> None:
        asyncio.run_coroutine_threadsafe(both(taken), loop).result(30)

    await asyncio.to_thread(alike)


@given(st.integers(0, 120), st.integers(0, 120), st.integers(1, 100), st.integers(0, 59_999))
def test_a_cost_fits_after_the_wait_and_not_much_before(spent: int, before: int, cost: int, passed: int) -> None:
    count, now = Count(START // 60_000, spent, before), START + passed
    if count.used(QUOTA, now) + cost <= QUOTA.candles:
        return
    wait = count.wait(QUOTA, cost, now)

    def fits(instant: int) -> bool:
        return count.at(instant // 60_000).used(QUOTA, instant) + cost <= QUOTA.candles + 1e-9

    assert fits(now + 1000 * wait)
    assert not fits(now + 1000 * (wait - 1) - 1)


async def test_equal_costs_at_one_instant_are_all_counted(state: State) -> None:
    quotas = Quotas(state, Clock(START), METRICS)
    standings = await asyncio.gather(*(quotas.spend("one", QUOTA, 10) for _ in range(12)))
    assert sum(each.fits for each in standings) == 10
    assert (await quotas.spend("another", QUOTA, 100)).fits


async def test_processes_share_a_count(state: State) -> None:
    clock = Clock(START)
    first, second = Quotas(state, clock, METRICS), Quotas(state, clock, METRICS)
    assert (await first.spend("one", QUOTA, 60)).fits
    refused = await second.spend("one", QUOTA, 60)
    assert (refused.fits, dict(refused.headers)[b"ratelimit"]) == (False, b'"candles";r=40;t=60')


async def test_what_no_window_holds_never_fits(state: State) -> None:
    assert (await Quotas(state, Clock(START), METRICS).spend("one", QUOTA, 101))[:2] == (False, None)


async def test_a_clock_that_is_behind_counts_in_the_newest_window(state: State) -> None:
    clock = Clock(START)
    quotas = Quotas(state, clock, METRICS)
    assert (await quotas.spend("one", QUOTA, 100)).fits
    clock.now -= 5_000
    assert not (await quotas.spend("one", QUOTA, 1)).fits


async def test_a_count_goes_on_in_this_process_while_redis_does_not_answer(state: State, monkeypatch: Any) -> None:
    async def no_answer(*_: Any) -> Any:
        raise TimeoutError

    quotas = Quotas(state, Clock(START), METRICS)
    assert (await quotas.spend("one", QUOTA, 30)).fits
    monkeypatch.setattr(state.line, "ask", no_answer)
    assert [(await quotas.spend("one", QUOTA, 40)).fits for _ in range(2)] == [True, False]


async def test_counts_end_on_their_own(state: State) -> None:
    await Quotas(state, Clock(START), METRICS).spend("one", QUOTA, 1)
    assert 0 < await state.redis.pttl("cc:1:quota:one") <= 120_000
