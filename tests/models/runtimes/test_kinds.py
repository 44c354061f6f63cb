"""Runtimes by name, and reduced precision: the context's tokens stay, forecasts hardly move, rows stay apart."""

from itertools import chain

import numpy as np
import pytest
import torch

from models.forecaster import forecast
from models.probes import is_batch_invariant, usual_contexts
from models.runtimes.cuda_graph import CudaGraphs
from models.runtimes.functions import flattened
from models.runtimes.kinds import KINDS, platform_name
from models.runtimes.parity import compare, record

BF16 = KINDS["eager-bfloat16"]
FAMILIES = ["toto", "kronos"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, forecasters):
    """A forecaster in float32 and in bfloat16."""
    forecaster = forecasters[request.param]
    return forecaster, forecaster.executed_by(BF16.load(forecaster.decoder, {}, 1))


def test_a_context_has_the_same_tokens_in_bfloat16(kronos, make_request):
    reduced = BF16.load(kronos.decoder, {}, 1)
    for seed in range(8):
        batch = kronos.prepare([make_request(100, 4, seed=seed)])
        arguments = batch.tensors["candles"], batch.tensors["pad"]
        with torch.inference_mode():
            expected, found = kronos.functions["tokenize"](*arguments), reduced["tokenize"](*arguments)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("horizon", [10, 200])
def test_bfloat16_moves_no_result_by_more_than_a_few_percent(pair, make_request, horizon):
    plain, reduced = pair
    horizon = min(horizon, plain.limits.max_horizon // 8 * 4)
    items = [make_request(60 - i, horizon, seed=i, samples=4) for i in range(3)]
    examples = BF16.served(plain.decoder).examples(0)
    parity = compare(record(plain, items), reduced.functions, examples)
    assert 1e-5 < max(parity.errors.values()) < 0.05
    assert parity.equal_tokens is None or parity.equal_tokens > 0.95


@pytest.mark.parametrize("horizon", [10, 200])
def test_bfloat16_forecasts_have_the_same_bits_alone_and_in_a_batch(pair, make_request, horizon):
    _, reduced = pair
    horizon = min(horizon, reduced.limits.max_horizon // 8 * 4)
    items = [make_request(64 - 5 * i, horizon - i % 2, seed=i, samples=8 - i) for i in range(4)]
    alone = [forecast(reduced, [item])[0] for item in items]
    for place, rows in enumerate((items, items[::-1])):
        together = forecast(reduced, rows)[:: -1 if place else 1]
        for one, other in zip(alone, together, strict=True):
            assert one.point.tobytes() == other.point.tobytes()
            assert one.quantiles["close"].tobytes() == other.quantiles["close"].tobytes()
    assert is_batch_invariant(reduced)


@pytest.mark.parametrize(("family", "dtype"), [("toto", "bfloat16"), ("kronos", "bfloat16"), ("kronos", "int8")])
def test_reduced_precision_leaves_the_float32_decoder_as_it_is(forecasters, family, dtype):
    decoder = forecasters[family].decoder
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    KINDS[f"eager-{dtype}"].load(decoder, {}, 1)
    for name, tensor in decoder.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_steps_in_8_bits_start_from_the_context_of_float32(kronos, make_request):
    """A context is read once and loses nothing; drawn candles are close."""
    kind = KINDS["eager-int8"]
    reduced = kronos.executed_by(kind.load(kronos.decoder, {}, 1), fours=kind.fours)
    items = [make_request(60 - i, 10, seed=i, samples=4) for i in range(3)]
    parity = compare(record(kronos, items), reduced.functions, kind.served(kronos.decoder).examples(0))
    assert parity.errors["tokenize"] == parity.errors["prefill"] == parity.errors["detokenize"] == 0
    assert 1e-5 < parity.errors["step"] < 0.05
    assert parity.equal_tokens > 0.95
    assert is_batch_invariant(reduced)


def test_toto_says_that_8_bits_gain_nothing(toto):
    with pytest.raises(ValueError, match="int8 gains nothing"):
        KINDS["eager-int8"].load(toto.decoder, {}, 1)


def test_a_row_that_its_company_changes_fails_the_test_of_batch_invariance(toto):
    """The test must be able to fail."""
    forward = toto.functions["forward"]

    def coupled(values, weights):
        found = forward(values, weights)
        return found._replace(loc=found.loc + found.loc.mean() * 1e-6)

    assert is_batch_invariant(toto)
    assert not is_batch_invariant(toto.executed_by({**toto.functions, "forward": coupled}))


def test_labels_say_runtime_and_dtype():
    assert all(kind.label == label == f"{kind.runtime}-{kind.dtype}" for label, kind in KINDS.items())
    assert {label for label, kind in KINDS.items() if kind.native} == {
        label for label in KINDS if label.startswith("compiled-")
    }


def test_runtimes_that_need_no_files_build_none(toto):
    for label in ("eager-bfloat16", "eager-int8", "cuda_graph-float32", "cuda_graph-bfloat16"):
        assert KINDS[label].build(toto.decoder) == {}


def test_the_platform_names_what_compiled_code_needs():
    assert platform_name(torch.device("cpu")).endswith(torch.backends.cpu.get_cpu_capability().lower())


@torch.inference_mode()
def test_graphs_that_were_not_captured_run_plain_and_are_counted(forecasters):
    for forecaster in forecasters.values():
        decoder = forecaster.decoder
        graphs = KINDS["cuda_graph-float32"].load(decoder, {}, 1)
        assert isinstance(graphs, CudaGraphs)
        assert (tuple(graphs), len(graphs), graphs.graphs) == (decoder.functions, len(decoder.functions), 0)
        for size in (0, 1, 1):
            for name, arguments in decoder.examples(size).items():
                found, expected = graphs[name](*arguments), getattr(decoder, name)(*arguments)
                assert type(found) is type(expected)
                for a, b in zip(*(flattened(result) for result in (found, expected)), strict=True):
                    assert torch.equal(a, b)
        assert graphs.misses == dict.fromkeys(decoder.functions, 3)
        assert not graphs.hits


def test_forecasts_over_graphs_without_captures_equal_eagers(forecasters, make_request):
    for forecaster in forecasters.values():
        graphs = KINDS["cuda_graph-float32"].load(forecaster.decoder, {}, 1)
        items = [make_request(64, 10, seed=seed, samples=4) for seed in range(2)]
        pairs = zip(*(forecast(f, items) for f in (forecaster, forecaster.executed_by(graphs))), strict=True)
        values = chain.from_iterable((one.quantiles["close"], other.quantiles["close"]) for one, other in pairs)
        for one, other in zip(*[iter(values)] * 2, strict=True):
            np.testing.assert_array_equal(one, other)
        assert sum(graphs.misses.values()) > 0


def test_inputs_of_all_graphs_lie_in_one_memory_and_those_of_one_apart(toto):
    graphs = KINDS["cuda_graph-float32"].load(toto.decoder, {}, 1)
    tensors = [torch.ones(3, 5), torch.ones(2, dtype=torch.bool), torch.ones(0, 4), torch.arange(7)]
    inputs = graphs._inputs_like(tensors)
    torch._foreach_copy_(list(inputs), tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(inputs, tensors, strict=True))
    assert graphs._inputs_like(tensors[1:])[0].data_ptr() == inputs[0].data_ptr()


def test_graphs_are_captured_for_one_context_of_every_bucket(forecasters):
    for family, lengths in {"toto": [512, 256], "kronos": [98, 49]}.items():
        assert usual_contexts(forecasters[family]) == lengths
