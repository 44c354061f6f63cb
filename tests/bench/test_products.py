"""The floor's shapes against products counted by hand and against what the engine really multiplies."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.floor import floor_work
from bench.products import Product, Stage, kronos_stages, toto_stages
from bench.published import KRONOS, TOTO_BASE, kronos_weights, request, toto_config, toto_weights
from models.families import build_forecaster

MINI = KRONOS["mini"]


def test_flops_are_two_per_multiplication():
    assert Product(2, 3, 5, count=7, batch=11).flops == 2 * 2 * 3 * 5 * 7 * 11
    assert Stage([Product(2, 3, 5)], repeats=4).flops == 4 * 60
    assert Stage([Product(2, 3, 5)], repeats=4).operand_elements == 60


def test_toto_by_hand():
    D, F, P, rows = 768, 3072, 64, 5 * 64
    block = 4 * D * D + 3 * D * F
    whole = rows * (64 * D + 10 * block + 2 * D * D) + 10 * 60 * 2 * P * P * 64
    tail = 20 * (2 * D * D + 3 * D * F + block + D * 64 * 96) + 60 * 2 * 4 * P * 64 + 4 * 12 * 2 * 5 * 5 * 64
    assert sum(stage.flops for stage in toto_stages(TOTO_BASE, symbols=1, patches=P)) == 2 * (whole + tail)


def test_kronos_step_by_hand():
    stages = kronos_stages(MINI, symbols=2, paths=4, context=64, slots=32, steps=30)
    draw, advance = stages[2], stages[3]
    D, F, rows = 256, 512, 8
    assert draw.repeats == 30
    assert draw.flops == 30 * 2 * rows * (2 * D * 1024 + D * D + 2 * D * (64 + 32))
    assert advance.repeats == 29
    assert advance.flops == 29 * 2 * rows * (4 * (4 * D * D + 3 * D * F + 2 * D * (64 + 32)) + 2 * D * D)


def test_weights_that_a_step_reads_are_all_the_weights_of_its_layers():
    advance = kronos_stages(KRONOS["small"], symbols=1, paths=1, context=64, slots=32, steps=30)[3]
    weights = sum(product.operand_elements for product in advance.products if product.batch == 1)
    assert weights == 8 * (4 * 512 * 512 + 3 * 512 * 1024) + 2 * 512 * 512


@pytest.fixture(scope="module")
def kronos(reference_kronos):
    return build_forecaster("kronos", MINI, kronos_weights(*reference_kronos(MINI)))


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("symbols", "paths"), [(1, 4), (4, 8)])
def test_engine_multiplies_what_the_floor_does(kronos, symbols, paths):
    batch = kronos.prepare([request(64, 8, seed, samples=paths) for seed in range(symbols)])
    stages = kronos_stages(MINI, symbols=symbols, paths=paths, context=64, slots=8, steps=8)
    assert counted(lambda: kronos.run(batch)) == pytest.approx(sum(stage.flops for stage in stages), rel=0.05)


def test_toto_engine_multiplies_what_the_floor_does(reference_toto):
    config = TOTO_BASE | {"embed_dim": 96, "mlp_hidden_dim": 192}
    weights = toto_weights(reference_toto(config))
    toto = build_forecaster("toto", toto_config(config), weights)
    batch = toto.prepare([request(512, 64, seed=1)])
    flops = sum(stage.flops for stage in toto_stages(config, symbols=1, patches=8))
    assert counted(lambda: toto.run(batch)) == pytest.approx(flops, rel=0.05)


def test_floor_does_the_flops_of_its_stages():
    stages = [Stage([Product(4, 16, 8, count=3), Product(2, 8, 4, batch=5)], repeats=2)]
    work = floor_work(stages, torch.float64, "cpu")  # which oneDNN has no layout for: the counter does not know its own
    assert counted(work) == sum(stage.flops for stage in stages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_floor_reads_repeated_weights_as_the_engine_does(dtype):
    floor_work([Stage([Product(4, 32, 16, count=2), Product(4, 8, 4, batch=5)], repeats=2)], dtype, "cpu")()
    floor_work([Stage([Product(4, 32, 16)])], dtype, "cpu")()
