"""ONNX Runtime on the CPU: eager's answers in float32, bounded errors in 8 bits, torch's own memory."""

import numpy as np
import pytest
import torch

from models.forecaster import forecast
from models.probes import is_batch_invariant
from models.runtimes.functions import flattened
from models.runtimes.parity import compare, record


def errors(forecaster, functions, make_request, rows=3, length=90):
    items = [make_request(length - i, 6, seed=i, samples=4) for i in range(rows)]
    return compare(record(forecaster, items), functions, forecaster.decoder.examples(0))


@pytest.mark.parametrize("family", ["toto", "kronos"])
@pytest.mark.parametrize(("rows", "length"), [(1, 30), (3, 90), (8, 64)])
def test_float32_files_answer_as_eager_does(forecasters, onnx_functions, make_request, family, rows, length):
    forecaster = forecasters[family]
    parity = errors(forecaster, onnx_functions(family, forecaster.decoder), make_request, rows, length)
    assert max(parity.errors.values()) <= 1e-5
    assert parity.equal_tokens == {"kronos": 1, "toto": None}[family]


@pytest.mark.long
def test_every_function_as_a_file_answers_as_eager_does(forecasters, onnx_functions, make_request):
    for family, horizon in (("toto", 200), ("kronos", 10)):
        forecaster = forecasters[family]
        functions = onnx_functions(family, forecaster.decoder, forecaster.decoder.functions)
        items = [make_request(90 - i, horizon, seed=i, samples=6) for i in range(3)]
        parity = compare(record(forecaster, items), functions, forecaster.decoder.examples(0))
        assert max(parity.errors.values()) <= 1e-5
        assert parity.equal_tokens is None or parity.equal_tokens > 0.999


@pytest.mark.long
def test_weights_in_8_bits_make_a_smaller_file_and_a_bounded_error(toto, onnx_file, onnx_functions, make_request):
    assert len(onnx_file("toto", "forward", True)) < 0.75 * len(onnx_file("toto", "forward", False))
    parity = errors(toto, onnx_functions("toto", toto.decoder, int8=True), make_request)
    assert 1e-5 < parity.errors["forward"] < 0.02


@pytest.mark.long
def test_rows_in_8_bits_have_the_same_bits_alone_and_in_a_batch(toto, onnx_functions):
    assert is_batch_invariant(toto.executed_by(onnx_functions("toto", toto.decoder, int8=True)))


@torch.inference_mode()
def test_results_lie_in_memory_of_their_own(toto, onnx_functions):
    forward = onnx_functions("toto", toto.decoder)["forward"]
    values, weights = toto.decoder.examples(0)["forward"]
    first = forward(values, weights)
    kept = [tensor.clone() for tensor in flattened(first)]
    forward(values + 1, weights)
    assert all(torch.equal(a, b) for a, b in zip(kept, flattened(first), strict=True))


@torch.inference_mode()
def test_inputs_that_are_not_contiguous_are_read_right(toto, onnx_functions):
    forward = onnx_functions("toto", toto.decoder)["forward"]
    values, weights = toto.decoder.examples(0)["forward"]
    strided = values.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    assert torch.equal(forward(strided, weights).outputs, forward(values, weights).outputs)


def test_forecasts_equal_eagers(forecasters, onnx_functions, make_request):
    for family, forecaster in forecasters.items():
        executed = forecaster.executed_by(onnx_functions(family, forecaster.decoder))
        items = [make_request(80 - i, 8, seed=i, samples=8) for i in range(3)]
        for one, other in zip(forecast(forecaster, items), forecast(executed, items), strict=True):
            np.testing.assert_allclose(other.quantiles["close"], one.quantiles["close"], rtol=1e-4)
