"""The functions that runtimes execute: traced for every shape, without reading anything back from the device."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.runtimes.functions import Flat, flattened, functions_of, rebuilt


class Sums(NamedTuple):
    total: Tensor
    rows: Tensor


class Small(nn.Module):
    """A decoder with one function."""

    functions = ("answer",)

    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self._answer = answer

    @property
    def device(self):
        return self.weight.device

    def examples(self, size):
        return {"answer": (torch.ones(2 + size, 4, device=self.device),)}

    def answer(self, x: Tensor) -> Sums:
        return Sums(self._answer(x * self.weight), x.sum(-1))


def on_meta(forecaster):
    """The forecaster on a device without memory: whatever asks for a value there fails."""
    forecaster.decoder.to("meta")
    if hasattr(forecaster, "_indices"):
        forecaster._indices = forecaster._indices.to("meta")
    return forecaster


def test_every_function_is_traced_once_for_every_shape(forecasters, family, name):
    decoder = forecasters[family].decoder
    program = Flat(decoder, name).exported().module()
    for size in (0, 1):  # the trace has seen one of them
        arguments = decoder.examples(size)[name]
        with torch.no_grad():
            expected = flattened(getattr(decoder, name)(*arguments))
            found = program(*flattened(arguments))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_examples_lie_in_memory_as_arguments_will(forecasters, family, name):
    assert all(tensor.is_contiguous() for tensor in Flat(forecasters[family].decoder, name).example)


def test_a_branch_on_data_is_not_traced():
    with pytest.raises(Exception, match="data-dependent"):
        Flat(Small(lambda x: x if x.sum() > 0 else -x), "answer").exported()


def test_a_size_that_examples_share_is_not_taken_for_one_that_may_change():
    assert Flat(Small(torch.sum), "answer").changing == [[0]]


@pytest.mark.parametrize(("family", "horizon"), [("toto", 10), ("toto", 200), ("kronos", 10)])
def test_run_reads_nothing_back_from_the_device(build_tiny, make_request, family, horizon):
    forecaster = on_meta(build_tiny(family))
    items = [make_request(length, horizon, seed=1, samples=5, top_k=3) for length in (40, 64)]
    raw = forecaster.run(forecaster.prepare(items))
    assert {tensor.device.type for tensor in raw.values()} == {"meta"}


@pytest.mark.parametrize(
    "host_sync",
    [
        lambda x: x * x.sum().item(),
        lambda x: x.cpu().sum(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.detach().numpy(),
    ],
)
def test_the_device_without_memory_finds_every_host_sync(host_sync):
    decoder = Small(host_sync).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        decoder.answer(*decoder.examples(0)["answer"])
    fine = Small(torch.sum).to("meta")
    fine.answer(*fine.examples(0)["answer"])


def test_flat_results_become_the_functions_named_tuples_again_nested_ones_too(forecasters, family, name):
    decoder = forecasters[family].decoder
    arguments = decoder.examples(0)[name]
    with torch.no_grad():
        expected = getattr(decoder, name)(*arguments)
        flat = Flat(decoder, name)
        found = rebuilt(decoder, name, lambda tensors: flat(*tensors))(*arguments)

    def assert_same(a, b):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
            return
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)

    assert_same(expected, found)


def test_eager_functions_are_the_decoders_methods(toto):
    assert functions_of(toto.decoder)["forward"] == toto.decoder.forward
    assert tuple(functions_of(toto.decoder)) == toto.decoder.functions
