"""Memory for models: how much there is, and what those still hold that were let go."""

import gc
import os
import time
import weakref
from pathlib import Path
from typing import Final, NamedTuple

import torch

from models.forecaster import Forecaster

DRAIN_SECONDS: Final = 30.0  # for requests that hold the memory that is needed

_SHARE: Final = 0.5  # for versions: the rest is for what forecasts need while they are computed, and the process itself
_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class _Gone(NamedTuple):
    forecaster: weakref.ref[Forecaster]
    bytes: int
    since: float  # time.monotonic() seconds


class Leaving:
    """Versions that were let go while requests may still be computed by them."""

    def __init__(self) -> None:
        self._gone: list[_Gone] = []

    def add(self, forecaster: Forecaster, size: int) -> None:
        """It was let go."""
        self._gone.append(_Gone(weakref.ref(forecaster), size, time.monotonic()))

    @property
    def bytes(self) -> int:
        """Size of those that are still there."""
        return sum(each.bytes for each in list(self._gone) if each.forecaster() is not None)

    def collect(self) -> None:
        """Have the memory back of what has been computed: graphs and what they run are cycles."""
        recent = time.monotonic() - DRAIN_SECONDS
        if any(each.forecaster() is not None and each.since > recent for each in self._gone):
            gc.collect()
        for each in [each for each in self._gone if each.forecaster() is None]:
            self._gone.remove(each)  # in place: another may be added meanwhile


def default_budget(device: str, limits: tuple[Path, ...] = _LIMITS) -> int:
    """Bytes that the versions in memory may take together: half of the device's, or of the container's."""
    if device.startswith("cuda"):
        return int(_SHARE * torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_SHARE * min([machine, *(found for path in limits if (found := _limit(path)))]))


def _limit(path: Path) -> int:
    """What the control group allows, 0 where it says nothing."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0  # else `max`
