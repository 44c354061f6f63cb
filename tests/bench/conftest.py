"""The reference implementations, as in tests/models."""

import pytest

from bench.references import build_kronos, build_toto


@pytest.fixture(scope="session")
def reference_toto():
    return build_toto


@pytest.fixture(scope="session")
def reference_kronos():
    return build_kronos
