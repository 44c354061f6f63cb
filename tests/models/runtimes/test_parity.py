"""The comparison that decides what is stored: it must find what is wrong, and where."""

import pytest
import torch

from models.runtimes.functions import functions_of
from models.runtimes.parity import compare, record


@pytest.fixture
def calls(kronos, make_request):
    return record(kronos, [make_request(40 - i, 4, seed=i, samples=4) for i in range(2)])


def spoilt(kronos, name, change):
    function = kronos.functions[name]
    return {**kronos.functions, name: lambda *arguments: change(function(*arguments))}


def test_every_call_of_a_batch_is_recorded_in_order(calls):
    assert [call.name for call in calls] == ["tokenize", "prefill", *["step"] * 4, "detokenize"]


def test_a_recorded_call_keeps_its_arguments_as_they_were(kronos, calls):
    """The cache is written in place between steps."""
    parity = compare(calls, kronos.functions, kronos.decoder.examples(0))
    assert parity.errors == dict.fromkeys(kronos.decoder.functions, 0.0)
    assert parity.equal_tokens == 1


def test_one_changed_weight_is_found_in_the_function_that_uses_it(build_tiny, calls):
    changed = build_tiny("kronos").decoder
    with torch.no_grad():
        changed.reconstruct.bias[0] += 0.01
    parity = compare(calls, functions_of(changed), changed.examples(0))
    assert parity.errors["detokenize"] > 1e-4
    assert parity.errors["step"] == parity.errors["prefill"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_an_infinite_error(kronos, calls, value):
    def change(candles):
        paths = candles.paths.clone()
        paths[0, 0, 0, 0] = value
        return candles._replace(paths=paths)

    parity = compare(calls, spoilt(kronos, "detokenize", change), kronos.decoder.examples(0))
    assert parity.errors["detokenize"] == float("inf")


def test_other_tokens_are_counted_and_their_calls_judged_by_that_alone(kronos, calls):
    def change(tokens):
        coarse = tokens.coarse.clone()
        coarse[:, -1] += 1
        return tokens._replace(coarse=coarse)

    parity = compare(calls, spoilt(kronos, "tokenize", change), kronos.decoder.examples(0))
    asked = sum(result.numel() for call in calls for result in call.result if not result.is_floating_point())
    changed = calls[0].arguments[0].shape[0]  # one of every row
    assert parity.equal_tokens == pytest.approx(1 - changed / asked)
    assert "tokenize" not in parity.errors
