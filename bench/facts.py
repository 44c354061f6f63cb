"""What a reader must know about the machine to judge a number. Neither host names nor paths."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

_PACKAGES: Final = ("numpy", "onnxruntime", "onnxruntime-gpu", "fastapi", "uvicorn", "kronos-model-arch", "toto-ts")
_CPU_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine_facts(device: str) -> dict[str, Any]:
    """Processor, memory, versions, threads, GPU, code revision, date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "device": device,
        "cpu": _cpu()["model name"],
        "cpu_flags": cpu_flags(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def header(facts: dict[str, Any]) -> str:
    """The facts in three lines."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    hardware = f"{facts['gpu']}, " if facts["gpu"] else ""
    return "\n".join(
        [
            f"{facts['date']}, revision {facts['revision']}, device {facts['device']}",
            f"{hardware}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['memory_gb']} GB"
            f" ({' '.join(facts['cpu_flags'])})",
            f"Python {facts['python']}, torch {facts['torch']}, {versions}",
        ]
    )


def cpu_flags() -> list[str]:
    """The instruction sets that matter here, of those the processor has."""
    found = _cpu()["flags"].split()
    return [flag for flag in _CPU_FLAGS if flag in found]


def _cpu() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, where there is one."""
    found = {"model name": platform.processor() or platform.machine(), "flags": ""}
    source = Path("/proc/cpuinfo")
    if source.is_file():
        for line in source.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    return found


def _revision() -> str:
    """The commit, with a + when files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
