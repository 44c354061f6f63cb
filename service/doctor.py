"""What of this machine will stop the service or make it slow, why, and what to do about it."""

import asyncio
import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

import torch
from rich.table import Column, Table

from model_store.artefacts import find_artefacts
from model_store.files import StoreError
from model_store.manifest import Manifest
from model_store.store import PRODUCTION, ModelStore
from models.runtimes.kinds import platform_name
from service.engine.memory import default_budget
from service.services import store_of
from service.settings import Settings
from service.state import REDIS_ERRORS, PrivateRedis, StateError, connect, raw

Level = Literal["fine", "note", "slow", "broken"]

_PACKAGES: Final = ("fastapi", "numpy", "onnxruntime", "pandas", "pydantic", "redis", "safetensors", "torch", "uvicorn")
_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
_FAST_BFLOAT16: Final = {"avx512_bf16", "amx_bf16", "bf16"}
_ROOM: Final = (10**8, 2 * 10**9)  # bytes of disk: the least that works, and what is soon used up
_SKEW_SECONDS: Final = 2.0
_LOCK: Final = Path(__file__).parents[1] / "requirements.lock"  # a wheel has none
_INFO: Final = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Finding:
    """One fact of the machine; `advice` says why it is no better than its level and what to do."""

    topic: str
    level: Level
    found: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Every finding, for a service with these settings. Nothing is started, and nothing changed but a probed folder."""
    store = store_of(settings)
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        _python,
        lambda: _torch(settings.device),
        lambda: processor(_read(_INFO[0])),
        lambda: _threads(settings.threads),
        lambda: _memory(settings),
        lambda: asyncio.run(_redis(settings)),
        lambda: _store(store, settings),
        packages,
        _compiler,
        lambda: _disk(settings.home),
        lambda: clock(store, time.time()),
    )
    for check in checks:
        yield from check()


def findings_table(findings: Iterable[Finding]) -> Table:
    """For people; the advice stands below what was found."""
    long_paths = Column(overflow="fold")  # are broken, not cut
    table = Table("", "", long_paths, box=None, show_header=False, padding=(0, 2, 0, 0))
    for each in findings:
        table.add_row(each.level, each.topic, "\n".join(filter(None, (each.found, each.advice))))
    return table


# -- the machine -----------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    yield Finding("python", "fine", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch(device: str) -> Iterator[Finding]:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    yield Finding("torch", "fine", f"{torch.__version__}, {build}")
    wanted = torch.device(device).type
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        idle = "" if wanted == "cuda" else "it stays idle: set CANDLECAST_DEVICE=cuda"
        yield Finding("gpu", "slow" if idle else "fine", names, idle)
    elif wanted == "cuda":
        advice = "the service cannot start: unset CANDLECAST_DEVICE, or install a driver and torch's CUDA build"
        yield Finding("gpu", "broken", f"none that torch can use, and CANDLECAST_DEVICE is {device}", advice)
    elif shutil.which("nvidia-smi"):
        yield Finding("gpu", "slow", "none that torch can use", "there is a driver: install torch's CUDA build")
    else:
        yield Finding("gpu", "note", "none", "forecasts run on the processor")


def processor(cpuinfo: str) -> Iterator[Finding]:
    """Its instruction sets, of a text as /proc/cpuinfo is."""
    facts: dict[str, str] = dict(re.findall(r"^([^\n:]+?)\s*:[ \t]*([^\n]*)", cpuinfo, re.MULTILINE))
    has = (facts.get("flags") or facts.get("Features") or "").split()
    flags = [flag for flag in _FLAGS if flag in has]
    found = f"{facts.get('model name', platform.machine())} ({' '.join(flags) or 'instruction sets unknown'})"
    if "flags" in facts and "avx2" not in flags:
        yield Finding("processor", "slow", found, "without AVX2 every product of matrices is slow: use a newer one")
    elif flags and not _FAST_BFLOAT16 & set(flags):
        yield Finding("processor", "note", found, "bfloat16 is emulated here: export float32 or int8 runtimes instead")
    else:
        yield Finding("processor", "fine", found)


def _threads(wanted: int | None) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.match(r"(\d+) (\d+)", _read(_INFO[2]))
    usable = min(cores, int(quota[1]) / int(quota[2])) if quota else cores
    threads = wanted or torch.get_num_threads()
    found = f"{threads} for one forecast, {usable:g} of {os.cpu_count()} cores usable"
    advice, best = "", max(1, int(usable))
    if threads > best:
        advice = f"they wait for each other: set CANDLECAST_THREADS={best}"
    elif threads < best and not wanted:
        advice = f"cores stay idle: set CANDLECAST_THREADS={best}, or unset OMP_NUM_THREADS"
    yield Finding("threads", "slow" if advice else "fine", found, advice)


def _memory(settings: Settings) -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    given = settings.memory_budget_gb
    cpu = "cpu" if not torch.cuda.is_available() else settings.device
    budget = given * 1e9 if given else default_budget(cpu)
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _read(_INFO[1]), re.MULTILINE)
    free = int(available[1]) * 1024 if available else total
    found = f"{_gb(free)} of {_gb(total)} available; models may take {_gb(budget)}"
    tight = cpu == "cpu" and budget > free
    advice = "models may take more than there is: end what else runs, or set CANDLECAST_MEMORY_BUDGET_GB"
    yield Finding("memory", "note" if tight else "fine", found, advice if tight else "")


def _compiler() -> Iterator[Finding]:
    name = os.environ.get("CXX", "g++")
    if found := shutil.which(name):
        yield Finding("compiler", "fine", found)
    else:
        advice = "`candlecast export --runtime compiled` needs one: install g++, or export onnx"
        yield Finding("compiler", "note", f"no {name}", advice)


def _disk(home: Path) -> Iterator[Finding]:
    place = next(each for each in (home.absolute(), *home.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    found = f"{_gb(free)} free for {home.absolute()}"
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        yield Finding("disk", "broken", found, "it cannot be written to: set CANDLECAST_HOME to a folder that can")
    elif free < _ROOM[0]:
        yield Finding("disk", "broken", found, "Redis' log and exported runtimes need room: make some")
    elif free < _ROOM[1]:
        yield Finding("disk", "note", found, "Redis' log and exported runtimes grow: make room soon")
    else:
        yield Finding("disk", "fine", found)


# -- what it has -----------------------------------------------------------------------------------


def packages(lock: Path = _LOCK) -> Iterator[Finding]:
    """Key packages beside the versions that were tested together."""
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", _read(lock), re.MULTILINE))
    missing, other = [], []
    for name in _PACKAGES:
        has = _installed(name)
        if has is None:
            missing.append(name)
        elif name in pinned and has.partition("+")[0] != pinned[name]:
            other.append(f"{name} {has} ({lock.name}: {pinned[name]})")
    if missing:
        advice = "install the package anew: pip install -c requirements.lock ."
        yield Finding("packages", "broken", f"not installed: {', '.join(missing)}", advice)
    if other:
        advice = "not the versions that are tested together: pip install -c requirements.lock ."
        yield Finding("packages", "note", "; ".join(other), advice)
    if not missing and not other:
        yield Finding("packages", "fine", f"as in {lock.name}" if pinned else "all there; no lock to compare with")


def _installed(name: str) -> str | None:
    for distribution in (name, f"{name}-gpu"):  # onnxruntime's
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return None


async def _redis(settings: Settings) -> list[Finding]:
    own = PrivateRedis(settings.home.resolve() / "redis")
    client = connect(settings.redis_url or own.url, seconds=2.0)
    try:
        info: Mapping[str, Any] = await client.info("server")
        seconds, micros = raw(await client.time())
    except REDIS_ERRORS as error:
        return [_absent(type(error).__name__) if settings.redis_url else _private(own)]
    finally:
        await client.aclose()
    found = f"{info['redis_version']} answers at {'CANDLECAST_REDIS_URL' if settings.redis_url else settings.home}"
    skew = time.time() - (seconds + micros / 1e6)
    late = Finding("clock", "note", f"{skew:+.1f} s from Redis'", "synchronise both clocks")
    return [Finding("redis", "fine", found), *([late] if abs(skew) > _SKEW_SECONDS else [])]


def _absent(why: str) -> Finding:
    advice = "forecasts from stored candles and all scores need it: start it, or unset CANDLECAST_REDIS_URL"
    return Finding("redis", "broken", f"CANDLECAST_REDIS_URL does not answer ({why})", advice)


def _private(server: PrivateRedis) -> Finding:
    try:
        binary = server.check()
        told = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (StateError, OSError, subprocess.SubprocessError) as error:
        return Finding("redis", "broken", f"{error}", "until then the service does not start")
    number = re.search(r"v=(\S+)", told)
    return Finding("redis", "fine", f"a private {number[1] if number else 'server'} will run: {binary}")


def _store(store: ModelStore, settings: Settings) -> Iterator[Finding]:
    try:
        names = store.models()
        found = {name: store.versions(name) for name in names}
    except (StoreError, OSError) as error:
        yield Finding(
            "store", "broken", f"{store.where}: {error}", "set CANDLECAST_STORE_ROOT to a store that can be read"
        )
        return
    count = sum(map(len, found.values()))
    if not count:
        advice = "there is nothing to forecast with: candlecast train RECIPE, or candlecast store import SOURCE"
        yield Finding("store", "broken", f"{store.where} is empty", advice)
        return
    yield Finding("store", "fine", f"{count} versions of {len(names)} models in {store.where}")
    for name in names:
        yield from _versions(store, name, found[name], settings.device)
    for word, name in (("toto", settings.toto), ("kronos", settings.kronos)):
        if name not in names or PRODUCTION not in store.aliases(name):
            advice = f"requests for `{word}` fail: candlecast store promote {name}, or set CANDLECAST_{word.upper()}"
            yield Finding("store", "note", f"no {name} in production", advice)


def _versions(store: ModelStore, name: str, versions: Iterable[str], device: str) -> Iterator[Finding]:
    """The broken ones (what is served is hashed, of others the manifest is read), and what runs only eagerly."""
    served = store.aliases(name).get(PRODUCTION)
    for each in versions:
        exact = f"{name}@{each}"
        try:
            manifest = store.verify(exact) if each == served else store.manifest(exact)
        except (StoreError, OSError) as error:
            advice = "serve another: candlecast store rollback, or promote" if each == served else "it is never loaded"
            yield Finding("store", "broken" if each == served else "note", f"{error}", advice)
            continue
        if each == served and _is_slow(store, manifest, device):
            advice = f"nothing faster was built here: candlecast export {name} --runtime compiled, or onnx"
            yield Finding("runtimes", "slow", f"{exact} runs eager-float32", advice)


def _is_slow(store: ModelStore, manifest: Manifest, device: str) -> bool:
    """Whether a network has no runtime for this machine but the eager one; on a GPU graphs need no export."""
    if manifest.family not in ("toto", "kronos") or device != "cpu":
        return False
    exact, place = f"{manifest.model}@{manifest.version}", platform_name(torch.device(device))
    try:
        return not find_artefacts(store, exact, platform=place, torch_version=torch.__version__)
    except (StoreError, OSError):  # damaged ones are not used
        return True


def clock(store: ModelStore, now: float) -> Iterator[Finding]:
    """Whether `now`, in seconds, comes after what has been stored already."""
    newest = 0.0
    with contextlib.suppress(StoreError, OSError):
        for name in store.models():
            with contextlib.suppress(StoreError, OSError):
                made = store.manifest(f"{name}@{store.versions(name)[-1]}").created_at
                newest = max(newest, datetime.fromisoformat(made).timestamp())
    told = f"{datetime.fromtimestamp(now).astimezone().isoformat(timespec='seconds')}"
    if now < newest - _SKEW_SECONDS:
        advice = "it is behind the newest version in the store: synchronise it, candles and keys are judged by it"
        yield Finding("clock", "broken", told, advice)
    else:
        yield Finding("clock", "fine", told)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not on this system
        return ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
