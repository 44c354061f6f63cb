"""Both sides of the training rows do the same work: one loss, of the same weights and batch."""

import pytest
import torch

from bench import steps, training
from bench.published import KRONOS_TINY, TOTO_TINY
from bench.workbench import Workbench

CONFIGS = {"toto": TOTO_TINY, "kronos": KRONOS_TINY}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(steps, "TOTO_CONTEXT", 128)
    monkeypatch.setattr(steps, "KRONOS_ROWS", 2)


@pytest.mark.filterwarnings("ignore")  # the references' own
@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_is_the_references_and_a_step_of_either_lowers_it(family):
    theirs = steps.SIDES[family]["theirs"](CONFIGS[family], "cpu")
    weights = {name: tensor.clone() for name, tensor in theirs.weights.items()}
    ours = steps.SIDES[family]["ours"](CONFIGS[family], "cpu", weights)
    losses = [side.loss() for side in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for side in (ours, theirs):
        side.step()
        assert side.loss() < losses[0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_step_is_timed_beside_the_references_and_its_memory_measured():
    wider = TOTO_TINY | {"embed_dim": 256, "mlp_hidden_dim": 1024}  # or the imports would need more than the step
    with Workbench(pace=0.01, toto_network=wider) as bench:
        speed, memory = training.toto_step(bench)[:2]
    assert set(speed.detail["milliseconds"]) == {"reference", "eager float32"}
    assert set(memory.detail["megabytes"]) == {"reference", "eager", "checkpointed"}
    assert memory.reached > 0
