"""Outgrowing one machine: forecasts/s of a thread and of two replicas, memory per model, Redis per symbol."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any, Final

from redis import Redis

from bench.http import computed, model_facts
from bench.processes import Load, resident_bytes
from bench.published import KRONOS_TINY, TOTO_TINY, random_weights, toto_config
from bench.rows import Row
from bench.service import Service, ccxt_rows, forecast_body, put_version, start_service
from bench.workbench import KRONOS_SMALL, TOTO, Workbench
from model_store.store import ModelStore
from service.state import PrivateRedis
from training.recipe import read_recipe

_ASKED: Final[dict[str, dict[str, Any]]] = {  # by family
    "toto": {"candles": 512, "horizon": 64},
    "kronos": {"candles": 64, "horizon": 30, "samples": 32},
}
_RECIPES: Final = Path(__file__).parents[1] / "training" / "recipes"
_CALLERS: Final = 8
_MINUTE_MS: Final = 60_000
_STORED: Final = 2000  # candles per symbol
_HORIZON: Final = 64
_SETTLE_SECONDS: Final = 3.0  # until what is written behind an answer is written


def replicas(bench: Workbench) -> Iterator[Row]:
    """One process of one thread, then two of them on one Redis, each with as many callers of its own."""
    store, settings = ModelStore(bench.folder / "capacity"), {"CANDLECAST_THREADS": "1"}
    families = _put_networks(bench, store)
    first, second = bench.folder / "replica-1", bench.folder / "replica-2"
    shared = settings | {"CANDLECAST_REDIS_URL": f"unix://{_socket(first)}"}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(start_service(store, first, settings)),
            stack.enter_context(start_service(store, second, shared)),
        ]
        for name, family in families.items():
            yield _scaling(bench, processes, name, family)


def _scaling(bench: Workbench, processes: Sequence[Service], name: str, family: str) -> Row:
    asked = _ASKED[family]
    body = forecast_body(name, **asked, cache="bypass")  # or one would answer what the other has computed
    settled = [process.warm_up(body) for process in processes]
    one, two, core = [], [], []
    for _ in range(1 if bench.quick else 3):
        used = _cpu_seconds(processes[0].process)
        alone = _load(processes[0], body, bench.seconds(10))
        core.append(len(alone.records) / (_cpu_seconds(processes[0].process) - used))
        one.append(alone.per_second)
        with ThreadPoolExecutor() as pool:
            both = pool.map(lambda process: _load(process, body, bench.seconds(10)), processes)
            two.append(sum(load.per_second for load in both))
    per_second = {"one replica": median(one), "two replicas": median(two), "a core's time": median(core)}
    detail = {**model_facts(settled[0]), "asked": asked, "per_second": per_second, "rounds": len(one)}
    ratio = median(many / few for few, many in zip(one, two, strict=True))
    return Row(f"{name} on two replicas of one thread, forecasts/s", "one of them", ratio, 1.8, "higher", "×", detail)


def _load(process: Service, body: bytes, seconds: float) -> Load:
    return computed(process.client.run(process.forecast_url(), body, clients=_CALLERS, seconds=seconds))


def _cpu_seconds(process: int) -> float:
    """What a process has used of all cores; unlike the clock, it does not go on while others have them."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(bench: Workbench) -> list[Row]:
    """What a process grows by when it loads a network and forecasts once, after it has loaded another of the family."""
    store = ModelStore(bench.folder / "capacity")
    _put_networks(bench, store)
    with start_service(store, bench.folder / "memory", {"CANDLECAST_THREADS": "1"}) as process:
        return [
            _growth(process, store, warm, name, family)
            for warm, name, family in (("toto-demo", TOTO, "toto"), ("kronos-demo", KRONOS_SMALL, "kronos"))
        ]


def _growth(process: Service, store: ModelStore, warm: str, name: str, family: str) -> Row:
    process.warm_up(forecast_body(warm, **_ASKED[family]))
    before = resident_bytes(process.process)
    settled = process.warm_up(forecast_body(name, **_ASKED[family]))
    grown = resident_bytes(process.process) - before
    [weights] = (store.root / name).glob("*/weights.safetensors")
    size = weights.stat().st_size
    detail = {
        **model_facts(settled),
        "megabytes": {"weights": size / 1e6, "before": before / 1e6, "grown": grown / 1e6},
    }
    return Row(f"memory of {name}, loaded", "its weights", grown / size, 1.5, "lower", "×", detail)


def redis(bench: Workbench) -> list[Row]:
    """Redis' memory and time per symbol, of candles of a minute: stored, forecast from, and scored by the next one.

    The networks are tiny: Redis cannot tell.
    """
    store, home, symbols = ModelStore(bench.folder / "tiny"), bench.folder / "redis-load", 20 if bench.quick else 200
    for family, config in (("toto", toto_config(TOTO_TINY, 512)), ("kronos", KRONOS_TINY)):
        put_version(store, f"{family}-tiny", family, config, random_weights(family, config))
    names, body = [f"S{number}" for number in range(symbols)], forecast_body("toto-tiny", None, horizon=_HORIZON)
    with start_service(store, home, {}) as process, closing(Redis(unix_socket_path=str(_socket(home)))) as client:
        process.warm_up(forecast_body("toto-tiny", 64))
        opening = _minute_with_time_left()
        candles = ccxt_rows(_STORED + 1, opening, _MINUTE_MS)
        for name in names:
            process.put(name, candles[:-1])
        stored = _kept(client, names)
        forecast = _Meter(client)
        for name in names:
            process.ask(body, symbol=name)
        asked = forecast.read(symbols)
        waiting = _kept(client, names) - stored
        time.sleep(max(0.0, opening / 1000 + 60 - time.time()) + 0.1)
        put = _Meter(client)
        counts = [process.put(name, candles[-1:], interval="1m") for name in names]
        given = put.read(symbols)
    if any((count["new"], count["scored"]) != (1, 1) for count in counts):
        raise RuntimeError(f"not every candle scored one step: {counts[0]}")
    kilobytes = {"candles": stored / symbols / 1e3, "forecast": waiting / symbols / 1e3}
    work = f"Redis' memory for 1,000 symbols, each of {_STORED:,} candles and a forecast of {_HORIZON} steps that waits"
    detail = {"symbols": symbols, "kilobytes per symbol": kilobytes}
    spent = (("a forecast from the history", asked), ("a put of one candle that scores one step", given))
    return [
        Row(work, "half a gigabyte", sum(kilobytes.values()), 512, "lower", " MB", detail),
        *(
            Row(f"Redis' time for {work}", "its one thread", used["microseconds"], 1000, "lower", " µs", used)
            for work, used in spent
        ),
    ]


def _minute_with_time_left() -> int:
    """The opening of this minute, UTC ms, or of the next where half of this one is over."""
    if (gone := time.time() % 60) > 20:
        time.sleep(60 - gone)
    return int(time.time() // 60) * _MINUTE_MS


def _kept(client: Redis, names: Sequence[str]) -> int:
    """Bytes that Redis holds for these symbols; the shared cache, which is bounded, is not among them."""
    return sum(
        int(client.memory_usage(key, samples=0) or 0)
        for name in names
        for key in client.scan_iter(f"cc:1:{{{name}[:}}]*", count=10_000)
    )


class _Meter:
    """Commands and time of Redis' one thread from here on."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._before = self._spent()

    def read(self, symbols: int) -> dict[str, float]:
        """Per symbol, once all is written."""
        time.sleep(_SETTLE_SECONDS)
        commands, seconds = (after - before for before, after in zip(self._before, self._spent(), strict=True))
        return {"microseconds": 1e6 * seconds / symbols, "commands": commands / symbols}

    def _spent(self) -> tuple[float, float]:
        told: dict[str, Any] = self._client.info("all")
        used = told["used_cpu_sys_main_thread"] + told["used_cpu_user_main_thread"]
        return float(told["total_commands_processed"]), float(used)


def _socket(home: Path) -> Path:
    """Where the private Redis of a service listens."""
    return home.resolve() / "redis" / PrivateRedis.SOCKET


def _put_networks(bench: Workbench, store: ModelStore) -> dict[str, str]:
    """Store random weights of the published sizes and of the demo models' recipes; name -> family."""
    demos = [read_recipe(_RECIPES / f"{name}.toml") for name in ("toto-demo", "kronos-demo")]
    networks = {
        TOTO: ("toto", toto_config(dict(bench.toto_network))),
        KRONOS_SMALL: ("kronos", dict(bench.kronos_config)),
        **{recipe.name: (str(recipe.family), recipe.network) for recipe in demos},
    }
    for name, (family, config) in networks.items():
        put_version(store, name, family, config, random_weights(family, config))
    return {name: family for name, (family, _) in networks.items()}
