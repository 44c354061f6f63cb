"""Which jobs a batch holds and why, and which requests are refused before they wait."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from model_store.manifest import Manifest
from models.forecaster import ForecastInput
from service.engine.batcher import Batcher, Bound, DeadlineExceeded, EngineStopped, Job, Overloaded, Place, Retry
from service.engine.registry import Beside, LoadedModel
from tests.service.conftest import Faulty, PutNaive

pytestmark = pytest.mark.anyio

MakeJob = Callable[..., Job]


@pytest.fixture
def job(put_naive: PutNaive, faulty: Faulty, forecast_input: Callable[..., ForecastInput]) -> MakeJob:
    """A job of a client, `seconds` before its deadline; jobs of one horizon share a bucket."""
    manifest: Manifest = put_naive()

    def make(seconds: float = 100.0, horizon: int = 3, seed: int = 0, client: str | None = None) -> Job:
        deadline = time.monotonic() + seconds
        future = asyncio.get_running_loop().create_future()
        return Job(LoadedModel(manifest, faulty), forecast_input(seed, horizon), future, deadline, deadline, client)

    return make


def take(batcher: Batcher) -> Bound:
    bound = batcher.take()
    assert bound is not None
    return bound


async def test_batches_say_why_they_are_no_larger(job: MakeJob) -> None:
    batcher = Batcher(max_rows=2)
    for made in (job(1), job(2), job(3), job(4, horizon=9)):
        batcher.put(made)
    assert [take(batcher).reason for _ in range(3)] == ["full", "oldest_deadline", "freed"]


async def test_a_request_that_finds_the_engine_waiting_is_taken_at_once(job: MakeJob) -> None:
    batcher = Batcher(max_rows=2)
    gone, only = job(), job()
    gone.future.cancel()
    batcher.put(gone)
    taken = asyncio.create_task(asyncio.to_thread(take, batcher))
    while batcher.depth:  # forgotten by the thread, which then has nothing to do
        await asyncio.sleep(0.001)
    batcher.put(only)
    assert await taken == Bound([only], "idle")


async def test_jobs_put_back_are_computed_alone(job: MakeJob) -> None:
    batcher = Batcher(max_rows=8)
    first, second, other = job(1), job(2), job(3)
    batcher.put(first)
    batcher.put(second)
    assert batcher.put_back(take(batcher).jobs, Retry("alone", 1))
    batcher.put(other)
    assert [take(batcher) for _ in range(3)] == [
        Bound([first], "alone"),
        Bound([second], "alone"),
        Bound([other], "freed"),
    ]


async def test_a_second_waiter_makes_a_job_both_more_urgent_and_longer_wanted(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    early, late = job(10), job(20, seed=1)
    batcher.put(early)
    batcher.put(late)
    assert batcher.join(late, time.monotonic() + 5)
    assert batcher.join(late, time.monotonic() + 90)
    assert take(batcher).jobs == [late]
    assert late.until > time.monotonic() + 80


async def test_nobody_joins_what_is_given_up(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    cancelled, late = job(), job(-1)
    cancelled.future.cancel()
    assert not batcher.join(cancelled, time.monotonic() + 9)
    assert not batcher.join(late, time.monotonic() + 9)


async def test_nothing_measured_refuses_nobody(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    for _ in range(50):
        batcher.put(job(0.5))
    assert batcher.depth == 50
    assert batcher.drain_seconds() == 0


async def test_what_an_idle_engine_cannot_do_in_time_is_refused_as_late(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    batcher.record(job().bucket, 1, 2.0)
    with pytest.raises(DeadlineExceeded, match="about 2000 ms"):
        batcher.put(job(1))
    batcher.put(job(3))


async def test_a_queue_too_long_for_the_deadline_is_refused_with_its_drain_time(job: MakeJob) -> None:
    batcher = Batcher(max_rows=2)
    for rows in (1, 2):
        batcher.record(job().bucket, rows, 2.0)
    for _ in range(5):
        batcher.put(job(7))  # the fifth and sixth would share the third batch
    batcher.put(job(7.5))
    with pytest.raises(Overloaded) as refused:
        batcher.put(job(7.9))
    assert refused.value.retry_after == 6
    assert batcher.depth == 6


async def test_jobs_that_can_wait_longer_are_not_in_the_way(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    batcher.record(job().bucket, 1, 2.0)
    for _ in range(10):
        batcher.put(job(100))
    batcher.put(job(3))
    assert batcher.drain_seconds() == pytest.approx(22)


async def test_the_batch_that_runs_counts_until_it_should_have_ended(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    batcher.record(job().bucket, 1, 50.0)
    batcher.put(job())
    take(batcher)
    assert 49 < batcher.drain_seconds() <= 50
    with pytest.raises(Overloaded):
        batcher.put(job(60))
    batcher.record(job().bucket, 1, 0.001)
    assert batcher.drain_seconds() <= 0.001


async def test_a_batch_ends_before_those_who_come_meanwhile_would_be_late(job: MakeJob) -> None:
    batcher = Batcher(max_rows=8)
    for rows, seconds in ((1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)):
        batcher.record(job().bucket, rows, seconds)
    for _ in range(8):
        batcher.put(job(6))
    with pytest.raises(Overloaded):  # the third batch, which would be as whole as the first two
        batcher.put(job(6))
    assert [len(take(batcher).jobs) for _ in range(2)] == [4, 4]


async def test_what_would_be_late_makes_nobody_else_late(job: MakeJob) -> None:
    batcher = Batcher(max_rows=2)
    late = [job(1.8, seed=seed) for seed in range(3)]
    others = [job(9), job(10)]
    for each in late + others:
        each.enqueued -= 90  # a while ago
        batcher.put(each)
    batcher.record(late[0].bucket, 1, 1.5)
    batcher.record(late[0].bucket, 2, 2.0)
    assert take(batcher).jobs == others
    assert take(batcher).jobs == late[:1]
    assert batcher.depth == 2


# -- clients -------------------------------------------------------------------------------------


def taken(batcher: Batcher) -> list[Job]:
    """Everything that waits, in the order in which it is taken."""
    found = []
    while batcher.depth:
        found += take(batcher).jobs
    return found


@pytest.mark.parametrize("clients", [[None], ["a"], ["a", None]])
async def test_one_client_and_what_is_nobody_s_go_by_deadline_alone(job: MakeJob, clients: list[str | None]) -> None:
    draw = random.Random(5)
    jobs = [job(draw.uniform(50, 90), draw.choice((3, 9)), client=draw.choice(clients)) for _ in range(30)]
    batcher = Batcher(max_rows=1)
    for each in jobs[:20]:
        batcher.put(each)
    first = [take(batcher).jobs[0] for _ in range(9)]
    for each in jobs[20:]:
        batcher.put(each)
    by_deadline = sorted(jobs[:20], key=lambda each: each.deadline)
    assert first == by_deadline[:9]
    assert taken(batcher) == sorted(by_deadline[9:] + jobs[20:], key=lambda each: each.deadline)


@pytest.mark.parametrize("horizon", [3, 9])  # of one bucket, and of two
async def test_clients_take_turns_however_many_jobs_one_of_them_has(job: MakeJob, horizon: int) -> None:
    flood = [job(10 + place, client="flood") for place in range(6)]
    few = [job(90 + place, horizon, client="few") for place in range(3)]
    batcher = Batcher(max_rows=1)
    for each in flood[:5] + few:
        batcher.put(each)
    order = [take(batcher).jobs[0] for _ in range(2)]
    batcher.put(flood[5])
    assert order + taken(batcher) == [flood[0], few[0], flood[1], few[1], flood[2], few[2], *flood[3:]]


async def test_a_newcomer_is_not_refused_for_what_another_client_has_waiting(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    batcher.record(job().bucket, 1, 2.0)
    for _ in range(5):
        batcher.put(job(11, client="flood"))
    late = time.monotonic() + 11
    for client in ("flood", None):
        with pytest.raises(Overloaded):
            batcher.put(job(11, client=client))
        with pytest.raises(Overloaded):
            batcher.expect(Place(late, client))
    batcher.expect(Place(late, "new"))
    batcher.expect(Place(late, "flood", b"another model"))
    batcher.put(job(11, client="new"))
    assert [each.client for each in taken(batcher)][:2] == ["flood", "new"]


async def test_requests_that_are_being_read_are_counted_by_those_who_come_after_them(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    batcher.record(job().bucket, 1, 2.0)
    batcher.put(job(11))
    late = time.monotonic() + 11
    places = [Place(late, None) for _ in range(4)]
    for place in places:
        batcher.expect(place)
    with pytest.raises(Overloaded):
        batcher.expect(Place(late, None))
    batcher.put(job(10), places.pop())  # who had a place takes no other one
    with pytest.raises(Overloaded):
        batcher.expect(Place(late, None))
    batcher.leave(places.pop())
    batcher.expect(Place(late, None))


async def test_turns_that_nobody_waited_for_are_forgotten(job: MakeJob) -> None:
    batcher = Batcher(max_rows=8)
    for _ in range(8):
        batcher.put(job(client="a"))
    take(batcher)
    batcher.put(job(10, 3, client="a"))
    batcher.put(job(20, 9, client="b"))
    assert [each.client for each in taken(batcher)] == ["a", "b"]


async def test_who_joins_waits_in_the_shorter_line(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    flood = [job(10 + place, client="flood") for place in range(3)]
    for each in flood:
        batcher.put(each)
    assert batcher.join(flood[2], time.monotonic() + 50, "few")
    assert batcher.join(flood[2], time.monotonic() + 50, None)
    assert batcher.join(flood[2], time.monotonic() + 50, "flood")
    assert taken(batcher) == [flood[0], flood[2], flood[1]]


async def test_a_closed_batcher_takes_and_gives_nothing(job: MakeJob) -> None:
    batcher = Batcher(max_rows=1)
    waiting = job()
    batcher.put(waiting)
    assert batcher.close() == [waiting]
    assert batcher.take() is None
    assert not batcher.put_back([waiting], Retry("alone", 1))
    with pytest.raises(EngineStopped):
        batcher.put(job())


async def test_versions_runtimes_and_dtypes_never_share_a_batch(job: MakeJob, put_naive: Any) -> None:
    one = job()
    buckets = {one.bucket}
    for model in (
        LoadedModel(put_naive(created_at="2025-03-03T00:00:00Z"), one.model.forecaster),
        LoadedModel(one.model.manifest, one.model.forecaster, runtime="compiled"),
        LoadedModel(one.model.manifest, one.model.forecaster, dtype="bfloat16"),
    ):
        buckets.add(Job(model, one.item, one.future, one.deadline, one.deadline).bucket)
    assert len(buckets) == 4


async def test_an_adapter_shares_batches_with_its_base_only_while_that_is_eager(job: MakeJob, put_naive: Any) -> None:
    base = job()
    manifest = put_naive(created_at="2025-03-03T00:00:00Z")
    own = LoadedModel(manifest, base.model.forecaster, "adapter", beside=Beside(base.model.exact, 0.0))
    compiled = LoadedModel(base.model.manifest, base.model.forecaster, runtime="compiled")
    adapter, fast = (Job(model, base.item, base.future, base.deadline, base.deadline) for model in (own, compiled))
    assert adapter.bucket == base.bucket != fast.bucket
