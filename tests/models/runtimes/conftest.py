"""What runtimes are tested with: every function of both tiny decoders, and artefacts that are built once."""

import copy
from collections.abc import Callable, Mapping
from functools import cache

import pytest

from models.forecaster import Forecaster
from models.runtimes import compiled, onnx
from models.runtimes.functions import Decoder, Functions, functions_of

FUNCTIONS = [(family, name) for family in ("toto", "kronos") for name in ("prefill", "step")]
FUNCTIONS += [("toto", "forward"), ("toto", "draw"), ("kronos", "tokenize"), ("kronos", "detokenize")]
QUICK = {"toto": ("forward",), "kronos": ("tokenize",)}  # seconds of a compiler, not minutes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"family", "name"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("family", "name"), sorted(FUNCTIONS))


@pytest.fixture(scope="session")
def toto(build_tiny: Callable[[str], Forecaster]) -> Forecaster:
    return build_tiny("toto")


@pytest.fixture(scope="session")
def kronos(build_tiny: Callable[[str], Forecaster]) -> Forecaster:
    return build_tiny("kronos")


@pytest.fixture(scope="session")
def forecasters(toto: Forecaster, kronos: Forecaster) -> Mapping[str, Forecaster]:
    return {"toto": toto, "kronos": kronos}


@pytest.fixture(scope="session")
def package(forecasters: Mapping[str, Forecaster]) -> Callable[[str, str], bytes]:
    """The compiled package of a family's function."""
    return cache(lambda family, name: compiled.compile_function(forecasters[family].decoder, name))


@pytest.fixture(scope="session")
def onnx_file(forecasters: Mapping[str, Forecaster]) -> Callable[[str, str, bool], bytes]:
    """The ONNX file of a family's function, in float32 or int8."""
    return cache(lambda family, name, int8: onnx.export_function(forecasters[family].decoder, name, int8=int8))


def limited(decoder: Decoder, *names: str) -> Decoder:
    """The decoder with these functions alone; tensors are shared."""
    few = copy.copy(decoder)
    few.functions = names
    return few


@pytest.fixture(scope="session")
def compiled_functions(package: Callable[[str, str], bytes]) -> Callable[..., Functions]:
    """A decoder's functions, of which `names` (by default the quick ones) are compiled."""

    def load(family: str, decoder: Decoder, names: tuple[str, ...] = ()) -> Functions:
        names = names or QUICK[family]
        packages = {name: package(family, name) for name in names}
        return {**functions_of(decoder), **compiled.load_functions(limited(decoder, *names), packages)}

    return load


@pytest.fixture(scope="session")
def onnx_functions(onnx_file: Callable[[str, str, bool], bytes]) -> Callable[..., Functions]:
    """As `compiled_functions`, of ONNX files."""

    def load(family: str, decoder: Decoder, names: tuple[str, ...] = (), *, int8: bool = False) -> Functions:
        names = names or QUICK[family]
        files = {name: onnx_file(family, name, int8) for name in names}
        return {**functions_of(decoder), **onnx.load_functions(limited(decoder, *names), files, decoder.device, 1)}

    return load
