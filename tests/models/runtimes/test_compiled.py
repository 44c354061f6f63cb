"""Packages compiled ahead of time: eager's answers at every shape, the decoder's own tensors, no compiler to load."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from models.forecaster import forecast
from models.probes import is_batch_invariant
from models.runtimes.functions import flattened, functions_of
from models.runtimes.parity import compare, record

pytestmark = pytest.mark.long  # to compile one function takes half a minute

FAMILIES = ["toto", "kronos"]


def calls_of(forecaster, make_request, rows, length=100, horizon=6, samples=8):
    items = [make_request(length - i, horizon, seed=i, samples=samples) for i in range(rows)]
    return record(forecaster, items)


@pytest.mark.parametrize("family", FAMILIES)
def test_packages_answer_as_eager_does_at_any_number_of_rows(forecasters, compiled_functions, make_request, family):
    forecaster = forecasters[family]
    functions = compiled_functions(family, forecaster.decoder)
    examples = forecaster.decoder.examples(0)
    for rows, length in ((1, 30), (2, 100), (3, 64), (8, 100)):
        parity = compare(calls_of(forecaster, make_request, rows, length), functions, examples)
        assert max(parity.errors.values()) <= 1e-5
        assert parity.equal_tokens == {"kronos": 1, "toto": None}[family]


def test_every_function_compiled_answers_as_eager_does(forecasters, compiled_functions, make_request):
    for family, horizon in (("toto", 200), ("toto", 10), ("kronos", 10)):
        forecaster = forecasters[family]
        functions = compiled_functions(family, forecaster.decoder, forecaster.decoder.functions)
        for rows, samples in ((1, 4), (3, 8), (5, 5)):
            calls = calls_of(forecaster, make_request, rows, 100, horizon, samples)
            parity = compare(calls, functions, forecaster.decoder.examples(0))
            assert max(parity.errors.values()) <= 1e-5
            assert parity.equal_tokens is None or parity.equal_tokens > 0.999
        assert is_batch_invariant(forecaster.executed_by(functions))


@torch.inference_mode()
def test_inputs_that_are_not_contiguous_are_read_right(toto, compiled_functions):
    functions = compiled_functions("toto", toto.decoder)
    values, weights = toto.decoder.examples(0)["forward"]
    strided = values.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    expected = functions["forward"](values, weights)
    for a, b in zip(flattened(expected), flattened(functions["forward"](strided, weights)), strict=True):
        assert torch.equal(a, b)


@torch.inference_mode()
def test_a_package_holds_no_weights_but_uses_the_decoders_own(tinies, compiled_functions):
    other = tinies(4)["toto"].build("toto").decoder  # compiled for other weights
    functions, arguments = compiled_functions("toto", other), other.examples(0)["forward"]
    before = functions["forward"](*arguments).outputs
    torch.testing.assert_close(before, other.forward(*arguments).outputs, rtol=1e-4, atol=1e-5)
    other.head_bias.add_(1)
    torch.testing.assert_close(functions["forward"](*arguments).outputs, before + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_forecasts_of_packages_equal_eagers(forecasters, compiled_functions, make_request, family):
    forecaster = forecasters[family]
    executed = forecaster.executed_by(compiled_functions(family, forecaster.decoder))
    for length in (30, 64, 100):
        items = [make_request(length - 3 * i, 8, seed=i, samples=8, with_paths=True) for i in range(3)]
        for one, other in zip(forecast(forecaster, items), forecast(executed, items), strict=True):
            np.testing.assert_allclose(other.point, one.point, rtol=1e-5)
            np.testing.assert_allclose(other.quantiles["close"], one.quantiles["close"], rtol=1e-5)
            if family == "kronos":
                np.testing.assert_allclose(other.paths, one.paths, rtol=1e-4)  # any other token is farther away


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_forecasts_have_the_same_bits_alone_and_in_a_batch(
    forecasters, compiled_functions, make_request, family
):
    executed = forecasters[family].executed_by(compiled_functions(family, forecasters[family].decoder))
    assert is_batch_invariant(executed)
    items = [make_request(100 - 7 * i, 8, seed=i, samples=8) for i in range(5)]
    assert len({executed.bucket(item) for item in items}) == 1
    for one, other in zip(forecast(executed, items), [forecast(executed, [i])[0] for i in items], strict=True):
        assert one.quantiles["close"].tobytes() == other.quantiles["close"].tobytes()


def test_a_package_loads_and_runs_where_there_is_no_compiler(
    toto, package, compiled_functions, make_request, monkeypatch, tmp_path
):
    package("toto", "forward")
    for name, value in {"PATH": str(tmp_path), "CXX": "/bin/false", "CC": "/bin/false"}.items():
        monkeypatch.setenv(name, value)
    executed = toto.executed_by(compiled_functions("toto", toto.decoder))
    assert np.isfinite(forecast(executed, [make_request(100, 8, seed=1)])[0].point).all()


def compiled_files():
    return sum(1 for path in Path(cache_dir()).rglob("*") if path.is_file())


def mixed_requests(make_request, count, seed=0):
    """Batches of requests that may share one: lengths, horizons, paths and rows at random."""
    draw = random.Random(seed)
    left = count
    while left:
        rows = min(left, draw.randint(1, 5))
        left -= rows
        horizon, samples = draw.randint(1, 8), draw.choice((1, 3, 4, 7, 8))
        length = draw.choice((20, 64, 100))
        settings = {"top_k": draw.choice((0, 3)), "top_p": draw.choice((0.5, 1.0))}
        yield [
            make_request(length - row, horizon, seed=draw.randrange(2**32), samples=samples, **settings)
            for row in range(rows)
        ]


@pytest.mark.parametrize("runtime", ["eager", "compiled"])
def test_nothing_is_compiled_by_a_thousand_mixed_requests(forecasters, compiled_functions, make_request, runtime):
    executed = {}
    for family, forecaster in forecasters.items():
        load = compiled_functions if runtime == "compiled" else lambda _, decoder: functions_of(decoder)
        executed[family] = forecaster.executed_by(load(family, forecaster.decoder))
    counters.clear()
    files, answered = compiled_files(), 0
    with torch.compiler.set_stance("fail_on_recompile"):
        for number, items in enumerate(mixed_requests(make_request, 1000)):
            answered += len(forecast(executed[FAMILIES[number % 2]], items))
    assert answered == 1000
    assert not counters
    assert compiled_files() == files
