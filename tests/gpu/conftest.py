"""Tests of a CUDA device; every one is skipped where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.forecaster import Forecaster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(without)


@pytest.fixture(params=["toto", "kronos"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def on_gpu(build_tiny: Callable[..., Forecaster], family: str) -> Any:
    """A forecaster on the device; products are taken in full float32, as the service takes them."""
    assert not torch.backends.cuda.matmul.allow_tf32
    return build_tiny(family, "cuda")


@pytest.fixture
def on_cpu(build_tiny: Callable[..., Forecaster], family: str) -> Any:
    return build_tiny(family, "cpu")
