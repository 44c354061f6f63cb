"""Files that were made to break their reader are refused by one line, at once and before they take memory."""

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from model_store import tensors as reading
from model_store.files import StoreError, VerificationFailed
from model_store.store import ModelStore
from model_store.upstream import import_checkpoint
from tests.forged import LIMITS, forge, tensor_file

HANGS = 60  # seconds
ROOM = 4 * 2**30  # more than anything here needs, far less than what it asks for
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(autouse=True)
def confined() -> Iterator[None]:
    """A reader that waits, or takes what it is told to take, fails instead of taking the machine with it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    signal.alarm(HANGS)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path, tiny: Any) -> Path:
    """A published Toto's folder."""
    home = tmp_path / "Toto"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(tiny["toto"].config["network"]))
    (home / "model.safetensors").write_bytes(save(dict(tiny["toto"].weights)))
    return home


@contextlib.contextmanager
def refused(match: str) -> Iterator[None]:
    with pytest.raises(StoreError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def kept_out(store: ModelStore, folder: Path, match: str) -> None:
    with refused(match):
        import_checkpoint(store, str(folder), "imported")
    assert store.models() == []


# -- tensor files -------------------------------------------------------------------------------

NOT_TENSORS = {
    "empty": b"",
    "shorter than a length": b"\x01\x02",
    "a length of 2^60": tensor_file({}, length=2**60),
    "a length beyond the file": tensor_file({"a": F32}, bytes(8), length=200),
    "no header": tensor_file(b""),
    "a header that is no JSON": tensor_file(b"\x80\x04pickle"),
    "a header in UTF-16": tensor_file("{}".encode("utf-16")),
    "a deep header": tensor_file(b'{"a":' * 100_000),
    "a header of a list": tensor_file([F32]),
    "one name twice": tensor_file(b'{"a": %b, "a": %b}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
    "one key twice": tensor_file(b'{"a": %b}' % json.dumps(F32).replace("{", '{"shape": [2], ').encode(), bytes(8)),
    "metadata that is none": tensor_file({"a": F32, "__metadata__": [1]}, bytes(8)),
    "an entry that is none": tensor_file({"a": 3}),
    "an entry without a shape": tensor_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "an entry with something more": tensor_file({"a": F32 | {"call": "os.system"}}, bytes(8)),
    "an unknown dtype": tensor_file({"a": F32 | {"dtype": "F32X"}}, bytes(8)),
    "a shape of fractions": tensor_file({"a": F32 | {"shape": [2.0]}}, bytes(8)),
    "a shape of truths": tensor_file({"a": F32 | {"shape": [True, 2]}}, bytes(8)),
    "a negative shape": tensor_file({"a": F32 | {"shape": [-2]}}, bytes(8)),
    "a shape whose product overflows": tensor_file({"a": F32 | {"shape": [2**32, 2**32, 4]}}, bytes(8)),
    "a shape of a million axes": tensor_file({"a": F32 | {"shape": [1] * 10**6}}, bytes(8)),
    "a size of 5,000 digits": tensor_file(b'{"a": {"shape": [%b]}}' % (b"9" * 5000)),
    "a shape beyond its bytes": tensor_file({"a": F32 | {"shape": [3]}}, bytes(8)),
    "a dtype beyond its bytes": tensor_file({"a": F32 | {"dtype": "F64"}}, bytes(8)),
    "offsets beyond the file": tensor_file({"a": F32 | {"shape": [200], "data_offsets": [0, 800]}}, bytes(8)),
    "offsets backwards": tensor_file({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
    "negative offsets": tensor_file({"a": F32 | {"data_offsets": [-8, 0]}}, bytes(8)),
    "tensors that overlap": tensor_file({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "two tensors in one place": tensor_file({"a": F32, "b": F32}, bytes(8)),
    "a hole between": tensor_file({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)),
    "a hole in front": tensor_file({"a": F32 | {"data_offsets": [8, 16]}}, bytes(16)),
    "bytes behind": tensor_file({"a": F32}, bytes(9)),
    "a pickle": b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n\x85R.",
    "an archive of torch.save": b"PK\x03\x04" + bytes(60),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_TENSORS)
def test_a_file_that_holds_no_tensors_is_refused(store: ModelStore, folder: Path, tiny: Any, what: str) -> None:
    (folder / "model.safetensors").write_bytes(NOT_TENSORS[what])
    kept_out(store, folder, r"Toto/model\.safetensors is not a safetensors file")
    reference = forge(store, tiny["toto"].config, NOT_TENSORS[what])
    with refused(rf"^{reference}: weights\.safetensors is not a safetensors file"):
        store.load(reference)


def test_what_another_writer_wrote_is_read_as_it_reads_it(store: ModelStore) -> None:
    """A padded header, tensors out of order, of no elements and of no axes: all of it is in the format."""
    header = {"b": F32 | {"data_offsets": [4, 12]}, "a": F32 | {"shape": [], "data_offsets": [0, 4]},
              "c": F32 | {"shape": [0, 9], "data_offsets": [4, 4]}, "__metadata__": {"format": "pt"}}  # fmt: skip
    data = torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    found = store.load(forge(store, {}, tensor_file(json.dumps(header).encode() + b"   ", data))).weights
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": 1.0, "b": [2.0, 3.0], "c": []}


# -- tensors and configs that are not of one network --------------------------------------------

NAME = "transformer.layers.0.norm1.scale"


def changed(weights: Any, name: str, tensor: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {key: value for key, value in {**weights, name: tensor}.items() if value is not None}


BAD_TENSORS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "NaN": (NAME, torch.tensor([torch.nan] + 31 * [1.0]), "holds NaN or infinity"),
    "infinity": (NAME, torch.tensor(31 * [1.0] + [-torch.inf]), "holds NaN or infinity"),
    "NaN in bfloat16": (NAME, torch.full((32,), torch.nan).bfloat16(), "holds NaN or infinity"),
    "missing": (NAME, None, rf"missing {NAME}"),
    "extra": ("backdoor", torch.ones(3), r"unexpected backdoor"),
    "longer": (NAME, torch.ones(33), rf"{NAME} is \[33\], the config needs \[32\]"),
    "transposed": (NAME, torch.ones(32, 1), rf"{NAME} is \[32, 1\]"),
    "whole numbers": (NAME, torch.ones(32, dtype=torch.int32), r"torch\.int32"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_tensor_that_is_not_the_networks_is_refused(store: ModelStore, folder: Path, tiny: Any, what: str) -> None:
    name, tensor, match = BAD_TENSORS[what]
    weights = changed(tiny["toto"].weights, name, tensor)
    (folder / "model.safetensors").write_bytes(save(weights))
    kept_out(store, folder, match)
    reference = forge(store, tiny["toto"].config, weights)
    with refused(f"^{reference}: .*{match}"):
        store.load(reference).build()


BOMBS: dict[str, dict[str, Any]] = {
    "a billion layers": {"num_layers": 10**9},
    "ten times the layers": {"num_layers": 20},
    "a width of 2^62": {"embed_dim": 2**62},
    "the widest there may be": {"embed_dim": 2**16, "mlp_hidden_dim": 2**16},
    "a width of 0": {"embed_dim": 0},
    "a negative width": {"embed_dim": -32},
    "a patch of 2^40": {"patch_size": 2**40, "stride": 2**40},
    "no heads": {"num_heads": 0},
    "heads that do not fit": {"num_heads": 5},
    "heads of odd width": {"num_heads": 32},
    "layers in words": {"num_layers": "2"},
    "layers as a truth": {"num_layers": True},
    "layers as a fraction": {"num_layers": 2.0},
    "layers as a list": {"num_layers": [2]},
    "a billion components": {"output_distribution_kwargs": {"k_components": 10**9}},
    "components of nothing": {"output_distribution_kwargs": [3]},
    "another scaler": {"scaler_cls": "x" * 10**6},
    "an unknown key": {"torch_dtype\n": "float32"},
    "an infinite exponent": {"scale_factor_exponent": 10**400},
    "an exponent in words": {"scale_factor_exponent": "10"},
    "a period of -7": {"spacewise_every_n_layers": -7},
    "a missing key": {"embed_dim": None},
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_config_that_describes_another_network_is_refused_before_it_is_built(
    store: ModelStore, folder: Path, tiny: Any, what: str
) -> None:
    network = {**tiny["toto"].config["network"], **BOMBS[what]}
    network = {key: value for key, value in network.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(network))
    kept_out(store, folder, "Toto")
    reference = forge(store, {**tiny["toto"].config, "network": network}, tiny["toto"].weights)
    with refused(f"^{reference}: "):
        store.load(reference).build()


OTHER_BOMBS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a context of 2^50": ("toto", lambda config: config | {"max_context": 2**50}),
    "a context without end": ("toto", lambda config: config | {"max_context": 1.5}),
    "no network": ("toto", lambda config: {"max_context": 512}),
    "a network of a list": ("toto", lambda config: config | {"network": [1]}),
    "scales in words": ("toto", lambda config: config | {"log_scales": "ab"}),
    "one scale": ("toto", lambda config: config | {"log_scales": [1.0]}),
    "a Kronos' context of 2^50": ("kronos", lambda config: config | {"context": 2**50}),
    "tokens of a billion bits": (
        "kronos",
        lambda config: {**config, **{part: config[part] | {"s1_bits": 10**9} for part in ("predictor", "tokenizer")}},
    ),
    "tokens that the predictor does not know": (
        "kronos",
        lambda config: config | {"tokenizer": config["tokenizer"] | {"s1_bits": 3, "s2_bits": 5}},
    ),
    "a billion encoders": (
        "kronos",
        lambda config: config | {"tokenizer": config["tokenizer"] | {"n_enc_layers": 10**9}},
    ),
    "heads that do not fit": ("kronos", lambda config: config | {"predictor": config["predictor"] | {"n_heads": 3}}),
}


@pytest.mark.parametrize("what", OTHER_BOMBS)
def test_a_versions_config_that_describes_no_network_is_refused(store: ModelStore, tiny: Any, what: str) -> None:
    family, change = OTHER_BOMBS[what]
    reference = forge(store, change(tiny[family].config), tiny[family].weights, family)
    with refused(f"^{reference}: "):
        store.load(reference).build()


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"[" * 10**6, b'{"a":' * 10**6, b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"{}1"]
)
def test_a_config_that_is_no_object_is_refused(store: ModelStore, folder: Path, tiny: Any, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    kept_out(store, folder, r"Toto/config\.json")
    reference = forge(store, text, tiny["toto"].weights)
    with refused(rf"^{reference}: config\.json"):
        store.load(reference)


# -- manifests and folders ----------------------------------------------------------------------

ELSEWHERE = {"bytes": 2, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "listed",
    [
        {"../../../outside": ELSEWHERE},
        {"/etc/passwd": ELSEWHERE},
        {"runtimes/x": ELSEWHERE},
        {"model.pkl": ELSEWHERE},
        {"a\n" * 500: ELSEWHERE},
        {"manifest.json": ELSEWHERE},
        {"config.json": None},
    ],
)
def test_a_manifest_that_lists_what_no_version_has_is_refused(
    store: ModelStore, tiny: Any, listed: dict[str, Any]
) -> None:
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights, **listed)
    for read in (store.load, store.verify):
        with refused(rf"^{reference}: manifest\.json (lists|is not a manifest)"):
            read(reference)


@pytest.mark.parametrize("size", [0, 1, 2**40, 10**30])
def test_a_size_that_is_a_lie_is_refused(store: ModelStore, tiny: Any, size: int) -> None:
    listed = {"weights.safetensors": {"bytes": size, "sha256": "0" * 64}}
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights, **listed)
    for read in (store.load, store.verify):
        with refused(rf"^{reference}: weights\.safetensors is not what was stored: \d+ bytes, not {size}"):
            read(reference)


def test_a_file_of_a_terabyte_of_nothing_is_refused(store: ModelStore, folder: Path, tiny: Any) -> None:
    terabyte = 2**40
    os.truncate(folder / "model.safetensors", terabyte)
    kept_out(store, folder, r"Toto/model\.safetensors has 1099511627776 bytes, this machine")
    listed = {"weights.safetensors": {"bytes": terabyte, "sha256": "0" * 64}}
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights, **listed)
    os.truncate(home_of(store, reference) / "weights.safetensors", terabyte)
    for read in (store.load, store.verify):
        with refused(rf"^{reference}: weights\.safetensors has 1099511627776 bytes, this machine"):
            read(reference)


def home_of(store: ModelStore, reference: str) -> Path:
    return Path(store.root) / reference.replace("@", "/")


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def become_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("change", [become_a_pipe, become_a_folder, become_a_link, become_a_device])
def test_what_is_no_plain_file_of_a_version_is_refused(
    store: ModelStore, tiny: Any, name: str, change: Callable[[Path], None]
) -> None:
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights)
    change(home_of(store, reference) / name)
    for read in (store.load, store.verify):
        with refused(f"{reference.replace(chr(64), chr(47))}/{name} is (a link|not a plain file)"):
            read(reference)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("change", [become_a_pipe, become_a_folder, become_a_device])
def test_what_is_no_plain_file_of_a_checkpoint_is_refused(
    store: ModelStore, folder: Path, name: str, change: Callable[[Path], None]
) -> None:
    change(folder / name)
    kept_out(store, folder, rf"has no {name}")


def test_a_linked_model_is_refused(store: ModelStore, tiny: Any, tmp_path: Path) -> None:
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights)
    home_of(store, reference).parent.rename(tmp_path / "elsewhere")
    home_of(store, reference).parent.symlink_to(tmp_path / "elsewhere")
    with refused(f"^{reference} is a link"):
        store.load(reference)


def test_hundreds_of_unlisted_files_are_one_line(store: ModelStore, tiny: Any) -> None:
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights)
    for number in range(200):
        (home_of(store, reference) / f"{number}\n").touch()
    with refused(rf"^{reference}: missing or unlisted: .* and 192 more"):
        store.load(reference)


# -- what changes while it is read --------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_what_was_hashed_is_what_is_used(
    store: ModelStore, tiny: Any, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """Another file in its place changes nothing; other bytes in the same file are noticed."""
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights)
    path = home_of(store, reference) / "weights.safetensors"
    evil = path.read_bytes()[:-64] + bytes(64)
    real = reading.open_listed

    @contextlib.contextmanager
    def slowly(*arguments: Any) -> Iterator[Any]:
        with real(*arguments) as file:
            if not in_place:
                path.unlink()
            path.write_bytes(evil)
            yield file

    monkeypatch.setattr(reading, "open_listed", slowly)
    if in_place:
        with pytest.raises(VerificationFailed, match=r"weights\.safetensors is not what was stored"):
            store.load(reference)
        return
    same(store.load(reference).weights, tiny["toto"].weights)


def test_bytes_that_change_after_they_were_read_change_no_tensor(store: ModelStore, tiny: Any) -> None:
    reference = forge(store, tiny["toto"].config, tiny["toto"].weights)
    loaded = store.load(reference)
    path = home_of(store, reference) / "weights.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    same(loaded.weights, tiny["toto"].weights)


def same(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# -- anything at all ----------------------------------------------------------------------------


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bytes changed, cut off, put in, or taken out at a place, given as a share of the whole."""
    place, kind = draw(st.floats(0, 1)), draw(st.sampled_from(["change", "cut", "insert", "remove"]))
    some = draw(st.binary(min_size=1, max_size=12))

    def mutate(data: bytes) -> bytes:
        at = int(place * len(data))
        if kind == "cut":
            return data[:at]
        kept = at if kind == "insert" else at + len(some)
        return data[:at] + (b"" if kind == "remove" else some) + data[kept:]

    return mutate


RANDOM = settings(
    deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@RANDOM
@given(name=st.sampled_from(["config.json", "weights.safetensors", "manifest.json"]), mutate=mutations())
def test_changed_bytes_are_refused_or_change_nothing(
    store: ModelStore, name: str, mutate: Callable[[bytes], bytes]
) -> None:
    weights = {"a.q_proj.weight": torch.arange(6.0).view(2, 3), "a.k_proj.weight": torch.ones(2, 3)}
    manifest = {"model": "good", "family": "toto", "origin": {"kind": "trained", "source": "x"}, "limits": LIMITS,
                "created_at": "2025-01-01T00:00:00Z"}  # fmt: skip
    version = store.put(manifest, {"a": 1}, weights).version
    path = Path(store.root) / "good" / version / name
    good = path.read_bytes()
    path.write_bytes(mutate(good))
    with contextlib.suppress(StoreError):
        same(store.load(f"good@{version}").weights, weights)
    path.write_bytes(good)


@RANDOM
@given(mutate=mutations())
def test_whatever_is_signed_for_is_a_network_or_refused(
    store: ModelStore, tiny: Any, mutate: Callable[[bytes], bytes]
) -> None:
    """Of tensors whose hashes fit; the header is a small part of them, and is aimed at."""
    whole = save(dict(tiny["toto"].weights))
    header = int.from_bytes(whole[:8], "little") + 8
    with contextlib.suppress(FileExistsError):  # the same bytes again
        reference = forge(store, tiny["toto"].config, mutate(whole[:header]) + whole[header:])
        with contextlib.suppress(StoreError):
            store.load(reference).build()
