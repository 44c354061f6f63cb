"""One step of fine-tuning all weights against the reference's own training step: how fast, and in how much memory."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch

from bench.facts import cpu_flags
from bench.processes import output_of
from bench.rows import Row
from bench.steps import KRONOS_LENGTH, KRONOS_ROWS, SIDES, TOTO_CONTEXT, TOTO_ROWS
from bench.workbench import Workbench

REFERENCE: Final = "reference"
_REACH: Final = 1.5
_SPEED: Final[Mapping[str, Mapping[str, bool]]] = {"eager": {}, "compiled": {"compile": True}}
_MEMORY: Final[Mapping[str, Mapping[str, bool]]] = {"eager": {}, "checkpointed": {"checkpoint": True}}


def toto_step(bench: Workbench) -> list[Row]:
    """Toto-base."""
    return _rows(bench, "toto", bench.toto_network, f"Toto-base, {TOTO_ROWS} × {TOTO_CONTEXT} candles")


def kronos_step(bench: Workbench) -> list[Row]:
    """Kronos-small."""
    return _rows(bench, "kronos", bench.kronos_config, f"Kronos-small, {KRONOS_ROWS} × {KRONOS_LENGTH} candles")


def _rows(bench: Workbench, family: str, config: Mapping[str, Any], what: str) -> list[Row]:
    precisions = ["float32", *(["bfloat16"] if _has_bfloat16(bench.device) else [])]
    found = []
    for precision in precisions:
        found.append(_speed(bench, family, config, f"training step of {what}", precision))
        found.append(_memory(bench, family, config, f"its peak memory, {precision}", precision))
    return found


def _has_bfloat16(device: str) -> bool:
    return torch.device(device).type == "cuda" or bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags()))


def _speed(bench: Workbench, family: str, config: Mapping[str, Any], work: str, precision: str) -> Row:
    """How many times longer the reference's step takes; compiling takes minutes, so not in a hurry."""
    theirs = SIDES[family]["theirs"](config, bench.device, precision=precision)
    kinds = {label: how for label, how in _SPEED.items() if not (bench.quick and "compile" in how)}
    weights = {name: tensor.clone() for name, tensor in theirs.weights.items()}
    ours = {
        f"{label} {precision}": SIDES[family]["ours"](config, bench.device, weights, precision=precision, **how)
        for label, how in kinds.items()
    }
    sides = {REFERENCE: theirs.step, **{label: side.step for label, side in ours.items()}}
    race = bench.race(sides, 40, at_least=1 if bench.quick else 3)
    fastest = min(ours, key=race.median)
    ratio = race.ratio(REFERENCE, fastest)
    detail = {
        "runtime": fastest.split()[0],
        "dtype": precision,
        "rounds": race.rounds,
        "interval": [ratio.low, ratio.high],
        "milliseconds": {side: 1e3 * race.median(side) for side in race.seconds},
    }
    return Row(work, "the reference's training step", ratio.value, _REACH, "higher", "×", detail)


def _memory(bench: Workbench, family: str, config: Mapping[str, Any], work: str, precision: str) -> Row:
    """Peak of this project's step over the reference's, each in a process of its own."""
    peak = partial(_peak, family=family, config=config, device=bench.device)
    theirs = peak(whose="theirs", how={"precision": precision})
    ours = {label: peak(whose="ours", how={"precision": precision, **how}) for label, how in _MEMORY.items()}
    megabytes = {label: size / 1e6 for label, size in {REFERENCE: theirs, **ours}.items()}
    detail = {"dtype": precision, "megabytes": megabytes}
    return Row(work, "the reference's", ours["eager"] / theirs, 1.0, "lower", "×", detail)


def _peak(**asked: Any) -> int:
    return int(output_of("bench.steps", json.dumps(asked), doing="the step").splitlines()[-1])
