"""Training on a CUDA device learns what it learns on a CPU, up to rounding."""

import tomllib
from pathlib import Path

import pytest

from model_store.store import ModelStore
from tests.training.small import small_recipe
from training.recipe import Recipe
from training.sample_data import write_samples
from training.train import train


def test_a_few_steps_end_near_those_of_a_cpu(tmp_path: Path, family: str) -> None:
    write_samples(tmp_path / "samples")
    content = tomllib.loads(small_recipe(family, tmp_path / "samples", steps=5, horizon=16))
    content["network"] |= {"context": 128} if family == "kronos" else {}
    recipe = Recipe.model_validate(content)
    store = ModelStore(tmp_path / "store")
    on_cpu, on_gpu = (
        train(recipe, store, lambda *_: None, tmp_path, restart=True, device=device) for device in ("cpu", "cuda")
    )
    assert on_cpu.training
    assert on_gpu.training
    assert on_gpu.training.losses == pytest.approx(on_cpu.training.losses, rel=1e-2)
    assert store.load(f"{on_gpu.model}@{on_gpu.version}").build("cuda").limits.max_horizon > 0
