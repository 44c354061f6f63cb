"""Adapters beside one network: as merged, to the bit whatever the company, and refused where they do not fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.published import merged_with, random_adapter
from models.adapters import Adapter, Adapters, Fitting, matrices_of
from models.forecaster import Forecast, Forecaster, ForecastInput, Sampling, forecast
from models.layers import WeightsMismatch
from models.probes import probe
from tests.conftest import Tiny
from training.tuning import MODULES

SCALE = 2.0
LARGE = 40.0  # so that other tokens are drawn
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # of float32, where sums are taken in another order

# Requests that take every function of a network: one patch and sampled ones; one path and several.
SETTINGS: dict[str, Any] = {"toto": ({}, {"steps": 66}), "kronos": ({"samples": 1}, {"samples": 8, "steps": 6})}


def ask(forecaster: Forecaster, seed: int, steps: int = 8, samples: int = 4) -> ForecastInput:
    item = probe(forecaster, seed, context=64, sampling=Sampling(samples=samples))
    times = np.arange(64 + steps, dtype=np.int64) * 3_600_000 + item.timestamps[0]
    return replace(item, future_timestamps=times[64:], local_times=times)


def computed(forecasters: list[Forecaster], items: list[ForecastInput]) -> list[Forecast]:
    """In one batch: each item encoded by the version that was asked, the batch run by the first."""
    batch = forecasters[0].prepare(items, [each.encode(item) for each, item in zip(forecasters, items, strict=True)])
    return forecasters[0].finish(forecasters[0].run(batch), batch)


def bits(found: Forecast) -> list[bytes]:
    return [found.point.tobytes(), found.prob_up.tobytes(), *(each.tobytes() for each in found.quantiles.values())]


@pytest.mark.parametrize("setting", [0, 1])
@pytest.mark.parametrize("family", ["toto", "kronos"])
def test_a_row_has_the_same_bits_alone_and_in_any_mix(tiny: dict[str, Tiny], family: str, setting: int) -> None:
    """Of adapters of other ranks, of other modules, and of rows that have none."""
    base = tiny[family].build(family)
    kinds = [(1, ()), (4, ()), (6, ()), (4, MODULES[family][1:3])]
    adapted = [
        base.adapted(matrices_of(random_adapter(family, tiny[family].weights, rank, seed, modules), SCALE))
        for seed, (rank, modules) in enumerate(kinds)
    ]
    versions = [adapted[1], base, adapted[0], adapted[2], adapted[1], adapted[3], base]
    items = [ask(base, seed, **SETTINGS[family][setting]) for seed in range(len(versions))]
    alone = [bits(computed([version], [item])[0]) for version, item in zip(versions, items, strict=True)]
    assert bits(forecast(base, [items[1]])[0]) == alone[1]
    assert len(set(map(str, alone))) == len(alone)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 3, 0], [2, 2, 5, 5, 0]):
        together = computed([versions[place] for place in order], [items[place] for place in order])
        assert [bits(each) for each in together] == [alone[place] for place in order]


@pytest.mark.parametrize("setting", [0, 1])
@pytest.mark.parametrize("family", ["toto", "kronos"])
def test_beside_its_base_it_forecasts_as_its_merged_weights(
    tiny: dict[str, Tiny], family: str, setting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-4 of every value, and no part of the adapter is left out."""
    used: set[str] = set()
    for name in ("add", "look_up"):
        plain = getattr(Adapters, name)
        spied = lambda self, part, *rest, plain=plain: used.add(part) or plain(self, part, *rest)  # noqa: E731
        monkeypatch.setattr(Adapters, name, spied)
    base = tiny[family].build(family)
    adapter = random_adapter(family, tiny[family].weights, 3, seed=9)
    merged = Tiny(tiny[family].config, merged_with(tiny[family].weights, adapter, LARGE)).build(family)
    beside = base.adapted(matrices_of(adapter, LARGE))
    items = [ask(base, seed, **SETTINGS[family][setting]) for seed in range(3)]
    for found, expected, without in zip(*(forecast(each, items) for each in (beside, merged, base)), strict=True):
        assert bits(found) != bits(without)
        np.testing.assert_allclose(found.point, expected.point, **TOLERANCE)
        for name, values in expected.quantiles.items():
            np.testing.assert_allclose(found.quantiles[name], values, **TOLERANCE)
    assert used == base.decoder.fitted(matrices_of(adapter, LARGE)).keys()


def test_the_adapters_of_published_sizes_keep_their_bits() -> None:
    """Products as wide as those of Toto-base and Kronos-small, at ranks from 1 to 16."""
    torch.manual_seed(0)
    for inputs, outputs, parts in ((768, 768, 1), (64, 768, 1), (512, 512, 3), (512, 1024, 2)):
        weight = torch.empty(parts * outputs, inputs, device="meta")
        adapters: list[Adapter] = []
        for rank in (1, 2, 8, 16, 8):
            matrices = {f"{part}": (torch.randn(rank, inputs), torch.randn(outputs, rank)) for part in range(parts)}
            fitting = Fitting(matrices, torch.device("cpu"))
            fitting.product("product", weight, [f"{part}" for part in range(parts)])
            adapters.append(fitting.done())
        x, out = torch.randn(5, 20, inputs), torch.zeros(5, 20, parts * outputs)
        together = Adapters(adapters).add("product", x, out)
        for row, adapter in enumerate(adapters):
            own = slice(row, row + 1)
            assert torch.equal(Adapters([adapter]).add("product", x[own], out[own])[0], together[row])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.popitem(), "has not both its matrices"),
        (lambda a: a.update({"other.lora_A.default.weight": torch.ones(2, 4)}), "has not both its matrices"),
        (lambda a: a.update({"bias": torch.ones(4)}), "'bias' is no finite matrix of low rank"),
        (lambda a: next(iter(a.values())).fill_(torch.nan), "is no finite matrix of low rank"),
        (
            lambda a: a.update(
                {"other.lora_A.default.weight": torch.ones(2, 4), "other.lora_B.default.weight": torch.ones(4, 2)}
            ),
            "the network has no 'other' to put it beside",
        ),
        (
            lambda a: a.update({next(name for name in a if "lora_A" in name): torch.ones(2, 7)}),
            "maps 7 to",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tiny: dict[str, Tiny], spoil: Callable[..., None], words: str) -> None:
    adapter = random_adapter("toto", tiny["toto"].weights, 2, seed=1)
    spoil(adapter)
    with pytest.raises(WeightsMismatch, match=words):
        tiny["toto"].build("toto").adapted(matrices_of(adapter, SCALE))
