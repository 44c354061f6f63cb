"""Calls that the workers of a Ray cluster take, with the results of one process that takes them in order."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any, Final

import torch

_RETRIES: Final = 3  # of a call whose worker was lost
_AHEAD: Final = 1000  # calls that the cluster knows of at a time
_SAME: Final = ("candlecast", "torch", "numpy")  # or the last digits differ


@dataclass(frozen=True)
class Call:
    """A function of a module, what it is called with, and what an error calls it."""

    title: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Cluster:
    """Workers that compute as this process would: with its number of threads, on the same versions."""

    def __init__(self) -> None:
        import ray

        self._threads = torch.get_num_threads()
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        self._task = ray.remote(num_cpus=min(self._threads, largest))(_take)

    def put(self, value: Any) -> Any:
        """A reference that stands for `value` among a call's arguments: each machine gets it once."""
        import ray

        return ray.put(value)

    def each(self, calls: Sequence[Call], done: Callable[[int], None] = lambda place: None) -> list[Any]:
        """The results in the order of the calls; `done` hears the place of each when it is there.

        A call whose worker is lost is taken anew, and counts once. RuntimeError names the first call that failed.
        """
        import ray

        upcoming, found = iter(enumerate(calls)), dict[int, Any]()
        waiting: dict[Any, int] = {}
        while True:
            for place, call in islice(upcoming, _AHEAD - len(waiting)):
                task = self._task.options(name=call.title, max_retries=_RETRIES)
                waiting[task.remote(call.function, self._threads, _versions(), *call.arguments)] = place
            if not waiting:
                return [found[place] for place in range(len(calls))]
            [reference], _ = ray.wait(list(waiting))
            place = waiting.pop(reference)
            found[place] = _result(reference, calls[place].title)
            done(place)


@contextmanager
def cluster(address: str, **local: Any) -> Iterator[Cluster]:
    """The Ray cluster at `address`: `auto`, `HOST:PORT`, or `local`, which is started here.

    `local` are settings of `ray.init` for the last of these. ValueError where there is none.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("a cluster needs Ray: pip install 'candlecast[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    how = {"include_dashboard": False, **local} if address == "local" else {}
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR", **how)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from error
    try:
        yield Cluster()
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """OSError where nothing listens at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _take(function: Callable[..., Any], threads: int, versions: Mapping[str, str], *arguments: Any) -> Any:
    """In a worker."""
    if (here := _versions()) != versions:
        raise RuntimeError(f"the worker has {here}, and not {versions}: its numbers would differ")
    torch.set_num_threads(threads)
    return function(*arguments)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _SAME}


def _result(reference: Any, title: str) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise RuntimeError(f"{title}: {error.cause}") from error
    except RayError as error:
        told = str(error).partition("\n")[0]
        raise RuntimeError(f"{title}: its worker was lost, retries included: {told}") from error
