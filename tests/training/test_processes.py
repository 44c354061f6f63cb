"""Two processes, as torchrun starts them, take the steps of one."""

import json
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store.store import ModelStore
from tests.training.small import small_recipe
from training.recipe import read_recipe
from training.train import train

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TWO_MACHINES = (*TORCHRUN[:3], "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
GRADIENTS = """
import sys
from tests.training.test_processes import save_gradients
save_gradients(sys.argv[1])
"""


def save_gradients(path):
    """The gradients of one batch of Toto's loss, as the loop leaves them."""
    import numpy as np

    from models.toto.network import TotoConfig, TotoNetwork
    from models.toto.transform import transform_of
    from tests.training.test_objectives import TOTO
    from training import processes
    from training.candle_files import Series
    from training.loop import fit
    from training.objectives import NextPatch
    from training.recipe import Phase
    from training.windows import Split, WindowSampler

    walk = 100 * np.exp(0.01 * np.random.default_rng(0).standard_normal(400).cumsum())
    candles = np.column_stack([walk, walk, walk, walk, np.full(400, 1e3), walk * 1e3])
    series = [Series("AAA", "1d", (12_000 + np.arange(400, dtype=np.int64)) * 86_400_000, candles)]
    torch.manual_seed(0)
    network = TotoNetwork(TotoConfig.from_published(TOTO))
    sampler = WindowSampler(series, Split(2 * 10**12, 2 * 10**12, horizon=1), 80, calendar="24/7")
    objective = NextPatch(network, {1: sampler}, transform_of(None), 64, np.random.default_rng(0))
    with processes.together():
        fit(objective, Phase(steps=1, learning_rate=1e-9, batch_rows=8, clip=1e9), lambda *_: None)
        if processes.rank() == 0:
            save_file({name: p.grad for name, p in network.named_parameters()}, path)


def run(*command):
    done = subprocess.run([*TORCHRUN, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_two_processes_give_the_gradients_of_one(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    save_gradients(tmp_path / "one")
    run(str(tmp_path / "gradients.py"), str(tmp_path / "two"))
    one, two = (load_file(tmp_path / name) for name in ("one", "two"))
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-8)


@pytest.mark.long
def test_two_processes_train_and_publish_one_version(sample_folder, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(small_recipe("toto", sample_folder, "[select]\nevery = 4\nstride = 800\n", steps=8))
    places = ("--store", str(tmp_path / "two"), "--home", str(tmp_path / "h2"))
    run("-m", "candlecast", "train", str(path), *places, "--json")
    train(read_recipe(path), ModelStore(tmp_path / "one"), lambda *_: None, tmp_path / "h1")
    (version,) = ModelStore(tmp_path / "two").versions("toto-demo")
    assert ModelStore(tmp_path / "two").verify(f"toto-demo@{version}").training.steps == 8
    logs = []
    for home in ("h1", "h2"):
        (log,) = (tmp_path / home).glob("runs/*/training.log")
        logs.append([json.loads(line) for line in log.read_text().splitlines()])
    one, two = logs
    assert [line["step"] for line in two] == list(range(1, 9))
    for name in ("loss", "gradient_norm", "crps"):
        expected = [line[name] for line in one if name in line]
        assert [line[name] for line in two if name in line] == pytest.approx(expected, rel=1e-3)


@pytest.mark.long
def test_two_machines_give_the_weights_of_one_with_two_processes(sample_folder, tmp_path):
    """Both on this one, with what two would share: the store and the home."""
    path = tmp_path / "recipe.toml"
    path.write_text(small_recipe("toto", sample_folder, steps=8))

    def command(where):
        return ("-m", "candlecast", "train", str(path), "--store", str(tmp_path / where / "store"), "--json")

    run(*command("one"), "--home", str(tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ("--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}")
    with ExitStack() as machines:
        started = [
            machines.enter_context(
                subprocess.Popen(
                    [*TWO_MACHINES, *meeting, *command("two"), "--home", str(tmp_path / "two")],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        for each in started:
            machines.callback(each.kill)
        said = [each.communicate(timeout=300)[0] for each in started]
    assert [each.returncode for each in started] == [0, 0], said
    assert sum('"version"' in each for each in said) == 1
    one, two = (ModelStore(tmp_path / where / "store").manifest("toto-demo") for where in ("one", "two"))
    assert one.files["weights.safetensors"] == two.files["weights.safetensors"]
