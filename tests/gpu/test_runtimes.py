"""Every runtime on the device: eager's answers, transfers from pinned memory, no wait inside `run`."""

import numpy as np
import pytest
import torch

from bench.published import request
from models.forecaster import forecast
from models.probes import probe
from models.runtimes.kinds import KINDS, platform_name
from models.runtimes.onnx import RuntimeUnavailable
from models.runtimes.parity import compare, record


def items_of(rows=3, horizon=10):
    return [request(64 - i, horizon, seed=i, samples=8) for i in range(rows)]


def test_float32_forecasts_on_the_device_equal_the_cpus(on_gpu, on_cpu):
    for batches in ([items_of()], [[item] for item in items_of()]):
        found, expected = ([one for items in batches for one in forecast(f, items)] for f in (on_gpu, on_cpu))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.quantiles["close"], b.quantiles["close"], rtol=1e-4)
            np.testing.assert_allclose(a.prob_up, b.prob_up, atol=1e-4)
    assert "-sm" in platform_name(torch.device("cuda"))


def test_a_context_has_the_same_tokens_in_bfloat16(build_tiny):
    kronos = build_tiny("kronos", "cuda")
    reduced = KINDS["eager-bfloat16"].load(kronos.decoder, {}, 1)
    batch = kronos.prepare(items_of())
    arguments = batch.tensors["candles"], batch.tensors["pad"]
    with torch.inference_mode():
        for a, b in zip(kronos.functions["tokenize"](*arguments), reduced["tokenize"](*arguments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch's own remark that it is a prototype
def test_run_never_waits_for_the_device(on_gpu, family):
    """torch raises at whatever would: `.item()`, `.cpu()`, a branch on data, a copy from pageable memory."""
    batch = on_gpu.prepare(items_of(horizon=200 if family == "toto" else 10))
    on_gpu.run(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_reach_the_device_whole_while_it_is_busy(on_gpu):
    """Pinned memory that was freed or reused too early would arrive changed."""
    items = [items_of(rows=4, horizon=8), [probe(on_gpu, seed) for seed in range(4)]]
    expected = [{name: t.cpu() for name, t in on_gpu.prepare(batch).tensors.items()} for batch in items]
    busy = torch.randn(4096, 4096, device="cuda")
    for number in range(100):
        if number % 10 == 0:
            for _ in range(5):
                busy = (busy @ busy).clamp(-1, 1)
        found = on_gpu.prepare(items[number % 2]).tensors
        for name, tensor in expected[number % 2].items():
            assert torch.equal(found[name].cpu(), tensor), name


def test_prepare_does_not_wait_for_a_busy_device(on_gpu):
    """Both ends of the queue are events: the transfer is still to come when `prepare` returns."""
    batch = items_of()
    on_gpu.prepare(batch)  # pinned blocks are kept from here on
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    done.record()
    on_gpu.prepare(batch)
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.long
def test_packages_compiled_for_the_device_answer_as_eager_does(on_gpu, family):
    kind = KINDS["compiled-float32"]
    functions = kind.load(on_gpu.decoder, kind.build(on_gpu.decoder), 1)
    calls = record(on_gpu, items_of(5, 100 if family == "toto" else 10))
    parity = compare(calls, functions, on_gpu.decoder.examples(0))
    assert max(parity.errors.values()) <= 1e-5
    assert parity.equal_tokens is None if family == "toto" else parity.equal_tokens > 0.999


@pytest.fixture
def onnx_functions(on_gpu):
    kind = KINDS["onnx-float32"]
    files = kind.build(on_gpu.decoder)
    try:
        return kind.load(on_gpu.decoder, files, 1)
    except RuntimeUnavailable as error:
        pytest.skip(f"ONNX Runtime has no CUDA here: {error}")


@pytest.mark.long
def test_onnx_bound_to_the_devices_memory_answers_as_eager_does(on_gpu, family, onnx_functions):
    calls = record(on_gpu, items_of(3, 100 if family == "toto" else 10))
    for _ in range(3):  # bound buffers are used again
        parity = compare(calls, onnx_functions, on_gpu.decoder.examples(0))
        assert max(parity.errors.values()) <= 1e-4  # another library's products
        assert parity.equal_tokens > 0.99
    executed = on_gpu.executed_by(onnx_functions)
    raw = executed.run(executed.prepare(items_of()))
    assert {tensor.device.type for tensor in raw.values()} == {"cuda"}
