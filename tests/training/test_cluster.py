"""A cluster of two workers on this machine: the numbers of one process, though workers are killed."""

import math
import operator
import os
import signal
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from model_store.store import ModelStore
from training import cluster as clusters
from training.cluster import Call, Cluster, cluster
from training.compare import compare
from training.recipe import Knob
from training.report import write_report
from training.study import Plan
from training.tune import tune_version


@pytest.fixture(scope="module")
def workers() -> Iterator[Cluster]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that there is room for two
    with cluster("local", num_cpus=2, object_store_memory=100 << 20) as found:
        yield found
    torch.set_num_threads(threads)


def taking(title: str) -> list[int]:
    """The processes below this one that are taking a call of which the title begins so."""
    found, parents = [], {os.getpid()}
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            name = (path / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if parent in parents:
            parents.add(int(path.name))
            if name.startswith(f"ray::{title}".encode()):
                found.append(int(path.name))
    return found


def test_results_leave_in_the_order_of_the_calls(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_AHEAD", 3)
    heard: list[int] = []
    assert workers.each([Call(f"{k}", operator.neg, (k,)) for k in range(20)], heard.append) == [-k for k in range(20)]
    assert sorted(heard) == list(range(20))


@pytest.mark.long
def test_a_call_whose_worker_was_lost_is_taken_anew_and_counts_once(workers: Cluster, tmp_path: Path) -> None:
    def fall_once(place: int, marks: Path) -> int:
        with (marks / str(place)).open("a") as file:
            file.write("taken\n")
        if place % 3 == 0 and (marks / str(place)).read_text().count("taken") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return place

    heard: list[int] = []
    assert workers.each([Call(f"{k}", fall_once, (k, tmp_path)) for k in range(5)], heard.append) == list(range(5))
    assert sorted(heard) == list(range(5))
    assert [(tmp_path / str(k)).read_text().count("taken") for k in (0, 3)] == [2, 2]


def test_a_call_that_fails_is_named_in_one_line(workers: Cluster) -> None:
    calls = [Call("the root of 1", math.sqrt, (1,)), Call("the root of -1", math.sqrt, (-1,))]
    with pytest.raises(RuntimeError, match=r"^the root of -1: .*(math domain error|nonnegative)[^\n]*$"):
        workers.each(calls)


@pytest.mark.long
def test_a_worker_that_is_lost_too_often_is_named(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_RETRIES", 1)
    with pytest.raises(RuntimeError, match=r"^the end: its worker was lost, retries included: [^\n]*$"):
        workers.each([Call("the end", os._exit, (1,))])


def test_a_worker_with_other_versions_is_refused(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_versions", lambda: {"torch": "1.0"})
    with pytest.raises(RuntimeError, match=r"of 1: the worker has .*torch.*, and not .'torch': '1\.0'."):
        workers.each([Call("the root of 1", math.sqrt, (1,))])


def test_an_address_where_nothing_listens_is_said_so() -> None:
    with pytest.raises(ValueError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused"), cluster("127.0.0.1:1"):
        pass


@pytest.mark.long
def test_an_evaluation_loses_a_worker_and_no_digit(
    workers: Cluster, store: ModelStore, sample_folder: Path, tmp_path: Path
) -> None:
    """Two families and two baselines, byte for byte."""
    done: dict[str, list[float]] = {}
    killed: list[int] = []

    def track(title: str, share: float, _: str) -> None:
        done.setdefault(title, []).append(share)
        if not killed and (busy := taking("kronos-demo@")):
            killed.append(busy[0])
            os.kill(busy[0], signal.SIGKILL)

    def judged(folder: str, workers: Cluster | None, track: Callable[[str, float, str], None] | None) -> bytes:
        found = compare(
            store,
            ["toto-demo", "kronos-demo"],
            ["naive", "ewma"],
            sample_folder,
            parts=["test", "unseen"],
            stride=40,
            samples=8,
            val_from=date(2009, 1, 1),
            test_from=date(2010, 6, 1),
            unseen=["IBM"],
            horizon=8,
            track=track,
            workers=workers,
        )
        write_report(found, tmp_path / folder)
        return (tmp_path / folder / "metrics.json").read_bytes()

    assert judged("cluster", workers, track) == judged("here", None, None)
    assert killed
    assert len(done) == 8
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in done.values())


@pytest.mark.long
def test_a_search_loses_a_worker_and_no_digit(
    workers: Cluster, store: ModelStore, sample_folder: Path, tmp_path: Path
) -> None:
    """Two generations: what the second tries depends on what the first found."""
    killed: list[int] = []
    told: list[float] = []
    space = {"serving.temperature": Knob(low=0.7, high=1.3), "serving.samples": Knob(choices=(4, 8))}

    def track(_: str, share: float, __: str) -> None:
        told.append(share)

    def kill() -> None:
        while not (busy := taking("search serving.")):
            if done.wait(0.01):
                return
        killed.extend(busy[:1])
        os.kill(busy[0], signal.SIGKILL)

    def tried(home: str, cluster: Cluster | None) -> list[object]:
        plan = Plan(trials=10, stride=30, horizon=4, cluster=cluster)
        [tuned] = tune_version("kronos-demo", store, track, tmp_path / home, plan, sample_folder, space)
        trials = [(trial.params, trial.values, trial.intermediate_values, trial.state) for trial in tuned.found.trials]
        return [tuned.found.current, trials, tuned.found.decision]

    done, killer = Event(), Thread(target=kill, daemon=True)
    killer.start()
    try:
        assert tried("cluster", workers) == tried("here", None)
    finally:
        done.set()
        killer.join()
    assert killed
    assert told == [k / 10 for k in range(1, 11)] * 2
