"""CUDA graphs: captured once per shape, replayed right, never captured late, and they hold no more memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils import _pytree

from bench.published import request
from models.forecaster import forecast
from models.probes import probe
from models.runtimes.cuda_graph import CudaGraphs
from models.runtimes.functions import flattened, functions_of
from models.runtimes.kinds import KINDS
from service.engine.selection import warm


def changed(arguments, seed):
    """Arguments of the same shapes with other numbers, zeros too; integers and masks stay, which index tables."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def change(tensor):
        if not tensor.is_floating_point() or not tensor.numel() or not torch.isfinite(tensor).all():
            return tensor.clone()
        drawn = torch.rand(tensor.shape, generator=generator, device=tensor.device).to(tensor.dtype)
        return torch.where(tensor == 0, drawn / 2, tensor * (0.5 + drawn))

    return _pytree.tree_map(change, arguments)


@pytest.fixture
def captured(on_gpu):
    """Graphs of every function at the shapes of `examples(1)`."""
    decoder = on_gpu.decoder
    graphs = CudaGraphs(decoder, functions_of(decoder))
    with torch.inference_mode():
        graphs.capturing = True
        for name, arguments in decoder.examples(1).items():
            graphs[name](*arguments)
        graphs.capturing = False
    assert graphs.graphs == len(decoder.functions)
    graphs.hits.clear()
    return graphs


@torch.inference_mode()
def test_a_hundred_replays_with_changing_inputs_answer_as_eager_does(on_gpu, captured):
    decoder = on_gpu.decoder
    examples = decoder.examples(1)
    for number in range(100):
        for name in decoder.functions:
            arguments = changed(examples[name], number)
            found, expected = captured[name](*arguments), getattr(decoder, name)(*arguments)
            assert type(found) is type(expected)
            for a, b in zip(flattened(found), flattened(expected), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert captured.hits == dict.fromkeys(decoder.functions, 100)
    assert not captured.misses


@torch.inference_mode()
def test_replays_with_other_inputs_give_other_answers(on_gpu, captured):
    """A graph that read its warm-up's inputs for ever would agree with nothing."""
    arguments = on_gpu.decoder.examples(1)
    for name in (on_gpu.decoder.functions[0], "step"):
        one, other = (captured[name](*changed(arguments[name], seed)) for seed in (1, 2))
        assert any(not torch.equal(a, b) for a, b in zip(flattened(one), flattened(other), strict=True))


@torch.inference_mode()
def test_the_next_replay_overwrites_no_answer(on_gpu, captured):
    for name, arguments in on_gpu.decoder.examples(1).items():
        first = captured[name](*changed(arguments, 1))
        kept = [tensor.clone() for tensor in flattened(first)]
        captured[name](*changed(arguments, 2))
        torch.cuda.synchronize()
        for a, b in zip(kept, flattened(first), strict=True):
            assert torch.equal(a, b)


@torch.inference_mode()
def test_a_shape_that_was_not_captured_runs_plain_and_is_counted(on_gpu, captured):
    decoder = on_gpu.decoder
    for name, arguments in decoder.examples(0).items():
        for a, b in zip(
            flattened(captured[name](*arguments)), flattened(getattr(decoder, name)(*arguments)), strict=True
        ):
            assert torch.equal(a, b)
    assert captured.misses == dict.fromkeys(decoder.functions, 1)
    assert not captured.hits
    assert captured.graphs == len(decoder.functions)


@torch.inference_mode()
def test_a_thousand_replays_hold_no_more_memory(on_gpu, captured):
    examples = on_gpu.decoder.examples(1)

    def replay(count):
        for _ in range(count):
            for name, arguments in examples.items():
                captured[name](*arguments)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = replay(20)
    assert replay(1000) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forecasts_through_graphs_equal_those_without(on_gpu, dtype):
    """Replayed where requests are usual, and run plain where they reach farther."""
    eager = on_gpu if dtype == "float32" else on_gpu.executed_by(KINDS["eager-bfloat16"].load(on_gpu.decoder, {}, 1))
    graphs = KINDS[f"cuda_graph-{dtype}"].load(on_gpu.decoder, {}, 1)
    executed = on_gpu.executed_by(graphs)
    warm(executed)
    assert graphs.graphs > 0
    assert not graphs.capturing
    captured = graphs.graphs
    usual, other = [probe(executed, seed) for seed in range(3)], [request(40 - i, 70, seed=i) for i in range(3)]
    for items, counted in ((usual, graphs.hits), (other, graphs.misses)):
        counted.clear()
        for rows in (items, items[:1], items):
            for one, two in zip(forecast(eager, rows), forecast(executed, rows), strict=True):
                np.testing.assert_allclose(two.point, one.point, rtol=1e-5)
                np.testing.assert_allclose(two.quantiles["close"], one.quantiles["close"], rtol=1e-5)
        assert sum(counted.values()) > 0
    assert graphs.graphs == captured


def test_forecasts_go_on_while_graphs_are_captured(on_gpu):
    """A service answers eagerly from its engine's thread while another thread settles on a runtime."""
    items = [request(64 - i, 10, seed=i, samples=8) for i in range(3)]
    expected = [one.point for one in forecast(on_gpu, items)]
    captured, answered = threading.Event(), 0
    graphs = KINDS["cuda_graph-float32"].load(on_gpu.decoder, {}, 1)
    with ThreadPoolExecutor(1) as other:
        capturing = other.submit(warm, on_gpu.executed_by(graphs))
        capturing.add_done_callback(lambda _: captured.set())
        while not captured.is_set():
            found = [one.point for one in forecast(on_gpu, items)]
            np.testing.assert_array_equal(found, expected)
            answered += 1
        capturing.result()
    assert graphs.graphs > 0
    assert answered > 0


def test_default_requests_over_any_candles_hit_what_the_warm_up_captured(on_gpu):
    graphs = KINDS["cuda_graph-float32"].load(on_gpu.decoder, {}, 1)
    executed = on_gpu.executed_by(graphs)
    warm(executed)
    graphs.hits.clear()
    graphs.misses.clear()
    for rows in (1, 2, 3, 8):
        for context in (None, 3, executed.limits.max_context // 2):
            forecast(executed, [probe(executed, seed, context=context) for seed in range(rows)])
    assert sum(graphs.hits.values()) > 0
    assert not graphs.misses
