"""The floor: the same matrix products in the same dtype and nothing else, over operands as large as the real ones.

Where a stage is repeated, its weights lie as they do in the engine's fastest runtime: in oneDNN's own layout, or in 8
bits. The engine cannot look fast beside a floor that multiplies slowly.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from bench.products import Product, Stage, kronos_stages, toto_stages
from bench.published import request
from bench.rows import Row
from bench.timing import Work
from bench.workbench import Workbench
from models.forecaster import Forecaster, ForecastInput, forecast

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_REACH: Final = 1.5


def kronos_floor(bench: Workbench, symbols: int, paths: int) -> list[Row]:
    """Kronos-small 64→30."""
    items = [request(64, 30, seed, samples=paths) for seed in range(symbols)]

    shapes = {"symbols": symbols, "paths": paths, "context": 64, "slots": 30, "steps": 30}
    stages = kronos_stages(bench.kronos_config, **shapes)
    work = f"engine on Kronos-small 64→30, {_plural(symbols, 'symbol')}, {_plural(paths, 'path')}"
    return _row(bench, work, bench.kronos, items, stages)


def toto_floor(bench: Workbench) -> list[Row]:
    """Toto-base, whole context."""
    longest = max(forecaster.limits.max_context for forecaster in bench.toto.values())

    stages = toto_stages(bench.toto_network, symbols=1, patches=longest // bench.toto_network["patch_size"])
    return _row(bench, f"engine on Toto-base {longest}→64", bench.toto, [request(longest, 64, seed=1)], stages)


def _row(
    bench: Workbench, work: str, ours: dict[str, Forecaster], items: Sequence[ForecastInput], wanted: Sequence[Stage]
) -> list[Row]:
    """Engine time (prepare, run, finish) of the fastest contender over the floor of its dtype."""
    comparable = {label: each for label, each in ours.items() if label.split()[1] in _DTYPES}
    floors = {
        dtype: floor_work(wanted, _DTYPES[dtype], bench.device) for dtype in {label.split()[1] for label in comparable}
    }
    sides: dict[str, Work] = {label: partial(forecast, each, items) for label, each in comparable.items()}
    found = bench.race({**sides, **floors}, 12)
    fastest = min(sides, key=found.median)
    runtime, dtype = fastest.split()
    ratio = found.ratio(fastest, dtype)
    read = sum(_bytes_read(stage, _DTYPES[dtype]) for stage in wanted)
    flops = sum(stage.flops for stage in wanted)
    detail = {
        "runtime": runtime,
        "dtype": dtype,
        "rounds": found.rounds,
        "interval": [ratio.low, ratio.high],
        "milliseconds": {side: 1e3 * found.median(side) for side in found.seconds},
        "floor_gflop": flops / 1e9,
        "floor_gflop_per_second": flops / 1e9 / found.median(dtype),
        "floor_gigabytes": read / 1e9,
        "floor_gigabytes_per_second": read / 1e9 / found.median(dtype),
    }
    return [Row(work, "its matrix products and weight reads alone", ratio.value, _REACH, "lower", "×", detail)]


def floor_work(stages: Sequence[Stage], dtype: torch.dtype, device: str) -> Work:
    """Something to time: every product back to back; one graph on CUDA."""
    calls = [
        (stage.repeats, [call for p in stage.products for call in _calls(p, dtype, device, stage.repeats > 1)])
        for stage in stages
    ]

    @torch.inference_mode()
    def work() -> None:
        for repeats, sequence in calls:
            for _ in range(repeats):
                for call in sequence:
                    call()

    return _captured(work) if torch.device(device).type == "cuda" else work


def _calls(product: Product, dtype: torch.dtype, device: str, repeated: bool) -> list[Work]:
    """The calls of one product, each with a right-hand side of its own, laid out as networks lay out weights."""
    is_weight = product.batch == 1
    plain = torch.float32 if dtype == torch.int8 else dtype
    left = torch.randn(product.batch, product.rows, product.inner, device=device).to(plain)
    rights = [
        torch.randn(product.batch, product.columns, product.inner, device=device).to(plain)
        for _ in range(product.count)
    ]
    if is_weight and repeated and dtype == torch.int8:
        rows, scale = left[0].bfloat16(), torch.ones(product.columns, device=device, dtype=torch.bfloat16)
        multiply = torch.ops.aten._weight_int8pack_mm
        return [partial(multiply, rows, right[0].to(torch.int8), scale) for right in rights]
    if is_weight and repeated and (packed := _packed(left[0], [right[0] for right in rights])):
        return packed
    out = torch.empty(product.batch, product.rows, product.columns, device=device, dtype=plain)
    if is_weight:
        return [partial(torch.mm, left[0], right[0].mT, out=out[0]) for right in rights]
    return [partial(torch.bmm, left, right.mT, out=out) for right in rights]


def _packed(left: Tensor, rights: Sequence[Tensor]) -> list[Work]:
    """Products by oneDNN over weights in its own layout; none where it does not know the device or the dtype."""
    try:
        laid_out = [torch.ops.mkldnn._reorder_linear_weight(right, len(left)) for right in rights]
        multiply = torch.ops.mkldnn._linear_pointwise
        calls: list[Work] = [partial(multiply, left, right, None, "none", [], "") for right in laid_out]
        calls[0]()
    except (RuntimeError, NotImplementedError):
        return []
    return calls


def _bytes_read(stage: Stage, dtype: torch.dtype) -> int:
    """Of weights, keys and values; in int8 only the weights of repeated stages are small."""
    if dtype != torch.int8:
        return stage.operand_elements * dtype.itemsize
    weights = stage.repeats * sum(product.operand_elements for product in stage.products if product.batch == 1)
    small = weights if stage.repeats > 1 else 0
    return small + (stage.operand_elements - small) * torch.float32.itemsize


def _captured(work: Work) -> Work:
    """`work` as one CUDA graph: its kernels without the time to launch them."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(_operands: Work = work) -> None:  # a graph knows addresses alone: whose they are must stay
        graph.replay()

    return replay


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
