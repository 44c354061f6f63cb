"""What a service settles on where it has a GPU: graphs are among the candidates, timed and tested on the device."""

from pathlib import Path

import numpy as np

from model_store.store import ModelStore
from models.forecaster import forecast
from models.probes import probe
from models.runtimes.cuda_graph import CudaGraphs
from service.engine.selection import Selection


def test_graphs_are_timed_beside_eager_and_the_choice_is_remembered(on_gpu, family, put_tiny, tmp_path: Path):
    store = ModelStore(tmp_path / "store")
    manifest = put_tiny(store, family)
    selection = Selection(store, tmp_path / "home", "cuda", None)
    assert selection.is_open(manifest)
    choice, chosen = selection.settle(manifest, on_gpu)
    assert set(choice.times_ms) == {"eager-float32", "cuda_graph-float32"}
    assert choice.batch_invariant is not None
    assert selection.remembered(manifest) == choice
    again, forecaster = selection.settle(manifest, on_gpu)
    assert again == choice
    items = [probe(on_gpu, seed) for seed in range(3)]
    for one, other in zip(forecast(chosen, items), forecast(forecaster, items), strict=True):
        np.testing.assert_allclose(other.quantiles["close"], one.quantiles["close"], rtol=1e-5)


def test_forced_graphs_serve_a_default_request(on_gpu, family, put_tiny, tmp_path: Path):
    store = ModelStore(tmp_path / "store")
    selection = Selection(store, tmp_path / "home", "cuda", "cuda_graph-float32")
    choice, chosen = selection.settle(put_tiny(store, family), on_gpu)
    assert (choice.label, choice.forced) == ("cuda_graph-float32", True)
    assert isinstance(chosen.functions, CudaGraphs)
    chosen.functions.hits.clear()
    forecast(chosen, [probe(chosen, 1)])
    assert sum(chosen.functions.hits.values()) > 0
