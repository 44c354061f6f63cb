"""A run that is killed goes on as if nothing had happened, and what is kept of it is always whole."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from model_store.manifest import WEIGHTS
from model_store.store import ModelStore
from models.families import build_forecaster
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig
from tests.training.small import small_recipe
from training.candle_files import digest
from training.evaluate import evaluate
from training.loop import Diverged, OutOfMemory, fit
from training.objectives import NextToken
from training.recipe import Phase, read_recipe
from training.resume import Place, read_state, run_folder, write_state
from training.train import prepare, train
from training.windows import WindowSampler, rolling_origins, split_by_dates


def command(recipe: Path, home: Path) -> list[str]:
    arguments = ["train", str(recipe), "--store", str(home / "store"), "--home", str(home), "--json"]
    return [sys.executable, "-m", "candlecast", *arguments]


def test_a_run_killed_midway_ends_with_the_weights_of_one_that_was_not(sample_folder, tmp_path):
    """Bit for bit: killed by a signal that no process can catch, as soon as there is anything to go on from."""
    path = tmp_path / "recipe.toml"
    choose = "[select]\nevery = 15\nstride = 200\nkeep = 1\n"
    path.write_text(small_recipe("toto", sample_folder, choose, steps=80, decay="0.5\nsave_every = 20\nema = 0.9"))
    recipe = read_recipe(path)
    killed = subprocess.Popen(command(path, tmp_path / "killed"), env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while killed.poll() is None and not list(tmp_path.glob("killed/runs/*/network.safetensors")):
            time.sleep(0.01)
    finally:
        killed.kill()
    assert killed.wait() == -signal.SIGKILL
    (state,) = tmp_path.glob("killed/runs/*/network.safetensors")
    assert len(read_state(state)[0]["losses"]) < 80
    manifests, logs = {}, {}
    for name in ("killed", "whole"):
        manifests[name] = train(recipe, ModelStore(tmp_path / name / "store"), lambda *_: None, tmp_path / name)
        (log,) = (tmp_path / name).glob("runs/*/training.log")
        logs[name] = [json.loads(line) for line in log.read_text().splitlines()]
    assert manifests["killed"].files[WEIGHTS] == manifests["whole"].files[WEIGHTS]
    assert manifests["killed"].training.steps == 80
    assert [line["step"] for line in logs["killed"]] == list(range(1, 81))
    assert [line["loss"] for line in logs["killed"]] == [line["loss"] for line in logs["whole"]]
    assert not list(tmp_path.glob("*/runs/*/*.safetensors"))  # nothing is left to go on from
    assert_published_weights_forecast_as_logged(recipe, ModelStore(tmp_path / "whole" / "store"), logs["whole"])


def assert_published_weights_forecast_as_logged(recipe, store, log):
    """Loaded from the store, they have the lowest CRPS on the val part that any weights had in training."""
    version, prepared = store.load(f"{recipe.name}@candidate"), prepare(recipe)
    judged = {line["step"]: line["crps"] for line in log if "crps" in line}
    assert list(judged) == [15, 30, 45, 60, 75, 80]
    forecaster = build_forecaster("toto", version.config, version.weights)
    origins = rolling_origins(prepared.series, prepared.split, "val", stride=200, min_context=recipe.context)
    scores = evaluate(forecaster, prepared.series, origins, lookback=recipe.context)
    assert scores.crps.mean() == pytest.approx(min(judged.values()), rel=1e-5)
    assert f"{min(judged.values()):.5f}" in version.manifest.training.notes[0]


class Killed(BaseException):
    pass


def test_kronos_goes_on_with_its_generators_and_moments(samples, tmp_path):
    """Stopped twice, between two states."""
    sampler = WindowSampler(samples, split_by_dates(date(2009, 1, 1), date(2010, 6, 1), horizon=16), 80)
    config = {"s1_bits": 4, "s2_bits": 4, "n_layers": 1, "d_model": 32, "n_heads": 4, "ff_dim": 64, "learn_te": True}
    tokens = {"d_in": 6, "d_model": 32, "n_heads": 4, "ff_dim": 64, "n_enc_layers": 2, "n_dec_layers": 2}
    bits = {"s1_bits": 4, "s2_bits": 4, "beta": 0.05, "gamma0": 1.0, "gamma": 1.1, "zeta": 0.05, "group_size": 4}
    phase = Phase(steps=12, learning_rate=1e-2, batch_rows=4, save_every=5)

    def run(place, stop=None):
        torch.manual_seed(0)
        tokenizer = KronosTokenizer(TokenizerConfig.from_published(tokens | bits))
        network = KronosPredictor(PredictorConfig.from_published(config))
        objective = NextToken(network, tokenizer, sampler, 64, np.random.default_rng(0))

        def report(_, note):
            if note.startswith(f"step {stop},"):
                raise Killed

        fit(objective, phase, report, place)
        return network.state_dict()

    whole = run(None)
    place = Place(tmp_path, "predictor")
    for stop in (7, 11):
        with pytest.raises(Killed):
            run(place, stop)
    resumed = run(place)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


class Fragile:
    """x^2, until step `fails`."""

    def __init__(self, fails: int, how):
        self.network = torch.nn.Linear(1, 1, bias=False)
        self.rng = np.random.default_rng(0)
        self._left, self._how = fails, how

    def parameters(self):
        return self.network.parameters()

    def draw(self, rows):
        return (torch.ones(rows, 1),)

    def loss(self, batch):
        self._left -= 1
        value = self.network(batch[0]).square().mean()
        return {"square": self._how(value) if self._left < 0 else value}

    def after_step(self): ...


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        (lambda loss: loss * torch.nan, Diverged, "the loss is nan at step 7: lower the learning rate"),
        (lambda loss: (loss - loss.detach()).sqrt() + 1, Diverged, "its gradient's norm is"),
        (lambda loss: torch.empty(1 << 58), OutOfMemory, "out of memory at step 7 with batch_rows = 32"),
    ],
    ids=["loss", "gradient", "memory"],
)
def test_what_ends_a_run_leaves_the_last_good_state(tmp_path, how, error, said):
    place = Place(tmp_path, "network")
    with pytest.raises(error, match=said) as raised:
        fit(Fragile(7, how), Phase(steps=20, learning_rate=0.1, save_every=5), lambda *_: None, place)
    assert f"kept in {place.state}" in str(raised.value)
    tensors, _ = read_state(place.state)
    assert len(tensors["losses"]) == 5
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_state_cut_short_while_it_was_written_is_not_there(tmp_path):
    place = Place(tmp_path, "network")
    write_state(place.state, {"losses": torch.ones(1)}, {"seconds": 1.5})
    place.state.with_suffix(".tmp").write_bytes(place.state.read_bytes()[:20])
    tensors, facts = read_state(place.state)
    assert (tensors["losses"].tolist(), facts) == ([1.0], {"seconds": 1.5})


def test_one_run_has_one_process_and_another_recipe_another_folder(samples, sample_folder, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(small_recipe("toto", sample_folder))
    recipe = read_recipe(path)
    other = recipe.model_copy(update={"seed": 1})
    whole, part = digest(samples), digest(samples[:3])
    with run_folder(tmp_path, recipe, whole) as folder:
        with pytest.raises(RuntimeError, match="by another process"), run_folder(tmp_path, recipe, whole):
            pass
        with run_folder(tmp_path, other, whole) as elsewhere, run_folder(tmp_path, recipe, part) as fewer:
            assert len({folder.path, elsewhere.path, fewer.path}) == 3


def test_a_line_of_the_log_cut_short_by_a_kill_is_written_again(tmp_path):
    place = Place(tmp_path, "predictor")
    log = place.log(0)
    Place(tmp_path, "tokenizer").log(0).write({"step": 9, "loss": 1.0})
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    path = tmp_path / "training.log"
    path.write_text(path.read_text() + '{"phase": "predictor", "st')
    place.log(2).write({"step": 3, "loss": 2.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [
        ("tokenizer", 9),
        *(("predictor", step) for step in (1, 2, 3)),
    ]
    assert lines[-1]["loss"] == 2.0
