"""The store in a bucket: a real S3 server over HTTP, and the client that everybody uses."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from model_store.files import StoreError, VerificationFailed, VersionNotFound
from model_store.gc import collect
from model_store.manifest import MANIFEST, WEIGHTS
from model_store.store import CANDIDATE, ModelStore
from model_store.tar import pack, unpack

CONFIG = {"max_context": 512}
TREE = Path(__file__).parents[2]


def tensors(value: float = 1.0, size: int = 12) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((size,), value)}


def manifest(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "family": "naive",
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "created_at": f"2026-01-02T03:04:{number:02d}+00:00",
        **changes,
    }


@pytest.fixture
def store(url: str, tmp_path: Path) -> ModelStore:
    return ModelStore(url, tmp_path / "mirror")


@pytest.fixture
def elsewhere(url: str, tmp_path: Path) -> ModelStore:
    """The same store on another machine."""
    return ModelStore(url, tmp_path / "another mirror")


def put(store: ModelStore, number: int = 0) -> str:
    return store.put(manifest(number), CONFIG, tensors(number)).version


def test_what_was_put_here_is_listed_verified_promoted_and_loaded_there(
    store: ModelStore, elsewhere: ModelStore
) -> None:
    assert store.models() == []
    first, second = put(store, 1), put(store, 2)
    assert elsewhere.models() == ["demo"]
    assert elsewhere.versions("demo") == [first, second]
    elsewhere.promote(f"demo@{first}")
    store.promote(f"demo@{second}", symbol="^GSPC")
    store.set_alias("demo", CANDIDATE, second)
    assert store.aliases("demo") == {"production": first, "candidate": second, "^GSPC": second}
    loaded = elsewhere.load("demo")
    assert loaded.manifest.version == first
    assert torch.equal(loaded.weights["layer.weight"], tensors(1)["layer.weight"])
    assert [entry["event"] for entry in store.log("demo")] == ["put", "put", "promote", "promote", "alias"]


def test_every_move_of_an_alias_moves_the_stamp(store: ModelStore, elsewhere: ModelStore) -> None:
    first, second = put(store, 1), put(store, 2)
    stamps = [elsewhere.stamp("demo")]
    for version in (first, second):
        store.promote(f"demo@{version}")
        stamps.append(elsewhere.stamp("demo"))
    store.set_shadow("demo", first, 0.1)
    stamps.append(elsewhere.stamp("demo"))
    store.end_shadow("demo")
    assert len(set(stamps)) == 4
    assert stamps[0] == ""
    assert elsewhere.stamp("demo") == stamps[2]


def test_an_exact_version_that_is_here_needs_no_bucket(store: ModelStore) -> None:
    version = put(store)
    store.load(f"demo@{version}")
    offline = ModelStore("s3://no-such-bucket/at/all", store.root.parent)
    store.root.rename(offline.root)
    assert offline.load(f"demo@{version}").manifest.version == version
    with pytest.raises(VersionNotFound, match="it has: none"):
        offline.load("demo")


def object_of(url: str, path: str) -> tuple[Any, str]:
    return fsspec.filesystem("s3"), f"{url.removeprefix('s3://')}/{path}"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "unlisted"])
def test_files_that_are_not_the_manifests_are_refused_until_they_are(
    store: ModelStore, elsewhere: ModelStore, url: str, damage: str
) -> None:
    version = put(store)
    store.promote("demo")
    files, path = object_of(url, f"demo/{version}/{WEIGHTS}")
    whole = files.cat_file(path)
    if damage == "flipped":
        files.pipe_file(path, bytes([whole[0] ^ 1]) + whole[1:])
    elif damage == "truncated":
        files.pipe_file(path, whole[:-1])
    elif damage == "missing":
        files.rm_file(path)
    else:
        files.pipe_file(f"{path}.pkl", b"cos\nsystem\n")
    with pytest.raises(VerificationFailed, match="weights"):
        elsewhere.verify(f"demo@{version}")
    if damage != "unlisted":  # which is never fetched
        with pytest.raises(VerificationFailed, match="weights"):
            elsewhere.load("demo")
    assert not (elsewhere.root / "demo" / version).exists()
    files.pipe_file(path, whole)
    assert elsewhere.load("demo").manifest.version == version


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000])
def test_a_broken_manifest_or_alias_is_refused(store: ModelStore, url: str, data: bytes) -> None:
    good, broken = put(store, 1), put(store, 2)
    files, path = object_of(url, f"demo/{broken}/{MANIFEST}")
    files.pipe_file(path, data)
    fresh = ModelStore(url, store.root.parent)
    with pytest.raises(VerificationFailed, match="is not a manifest"):
        fresh.verify(f"demo@{broken}")
    assert fresh.versions("demo") == [broken, good]
    files.pipe_file(object_of(url, "demo/aliases/production.json")[1], data)
    with pytest.raises(VerificationFailed, match="is not an alias"):
        fresh.resolve("demo")


def test_a_mirror_that_rotted_is_refused_and_fetched_anew(store: ModelStore) -> None:
    version = put(store)
    store.load(f"demo@{version}")
    (store.root / "demo" / version / WEIGHTS).write_bytes(b"rot")
    with pytest.raises(VerificationFailed, match="is not what was stored"):
        store.load(f"demo@{version}")
    assert store.load(f"demo@{version}").manifest.version == version


_KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from s3fs import S3FileSystem
    from model_store import roots
    from model_store.store import ModelStore

    real, calls = S3FileSystem._cat_file, []

    async def counted(self, path, *args, **kwargs):
        calls.extend([path] if "weights" in path else [])
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return await real(self, path, *args, **kwargs)

    S3FileSystem._cat_file = counted
    roots._CHUNK = 1000
    ModelStore(sys.argv[1], Path(sys.argv[2])).load(sys.argv[3])
""")


def test_a_download_that_was_killed_goes_on_where_it_was(
    store: ModelStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.put(manifest(), CONFIG, tensors(2.0, size=1000)).version
    command = [sys.executable, "-c", _KILLED, url, str(tmp_path / "mirror"), f"demo@{version}"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(TREE), *sys.path])}
    assert subprocess.run(command, env=paths, timeout=120, check=False).returncode == -signal.SIGKILL
    (partial,) = (store.root / "demo").glob(".partial-*")
    assert (partial / WEIGHTS).stat().st_size == 2000
    assert not (store.root / "demo" / version).exists()
    asked: list[tuple[str, int]] = []
    files = store._at._files[0]  # type: ignore[attr-defined]
    real = files.cat_file

    def noted(path: str, start: int | None = None, end: int | None = None) -> bytes:
        asked.append((Path(path).name, start or 0))
        return bytes(real(path, start=start, end=end))

    monkeypatch.setattr(files, "cat_file", noted)
    assert torch.equal(store.load(f"demo@{version}").weights["layer.weight"], torch.full((1000,), 2.0))
    assert [each for each in asked if each[0] == WEIGHTS] == [(WEIGHTS, 2000)]
    assert not partial.exists()


def test_a_publication_that_ends_before_its_manifest_is_invisible(
    store: ModelStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = object_of(url, "demo")
    real = files.pipe_file

    def ended(path: str, data: bytes) -> None:
        if path.endswith(MANIFEST):
            raise KeyboardInterrupt
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store._at._files[0], "pipe_file", ended)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            put(store)
    assert len(files.find(path)) == 2
    assert store.models() == []
    assert store.versions("demo") == []
    version = put(store)
    assert ModelStore(url, tmp_path / "third").verify(f"demo@{version}").version == version


def test_of_two_promoters_at_once_one_wins_whole_and_both_are_in_the_log(
    store: ModelStore, elsewhere: ModelStore
) -> None:
    before, *rivals = (put(store, number) for number in range(3))
    store.promote(f"demo@{before}")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: pair[0].promote(f"demo@{pair[1]}"), zip((store, elsewhere), rivals, strict=True)))
    found = store.aliases("demo")
    assert found["production"] in rivals
    assert found["previous"] in {before, *rivals} - {found["production"]}
    assert [entry["version"] for entry in store.log("demo") if entry["event"] == "promote"][1:] in (
        rivals,
        rivals[::-1],
    )


@pytest.fixture
def new_clients() -> Iterator[None]:
    """Clients are kept with the environment that they were made in."""
    fsspec.filesystem("s3").clear_instance_cache()
    yield
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.usefixtures("new_clients")
def test_a_server_that_is_gone_or_a_client_that_is_missing_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StoreError, match=r"s3://gone/x.*Could not connect"):
            ModelStore("s3://gone/x", tmp_path).models()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match=r"pip install 'candlecast\[gs\]'"):
        ModelStore("gs://bucket/x", tmp_path).models()


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    version = put(ModelStore(tmp_path / "store"))
    assert ModelStore(f"file://{tmp_path}/store").versions("demo") == [version]


def test_what_is_collected_is_gone_from_the_bucket_and_from_the_mirror(
    store: ModelStore, elsewhere: ModelStore, url: str
) -> None:
    old, kept, new = (put(store, number) for number in range(3))
    store.load(f"demo@{old}")
    elsewhere.hold("demo", [kept])
    assert [manifest.version for manifest in collect(store, keep=1)] == [old]
    assert store.versions("demo") == [kept, new]
    files, path = object_of(url, f"demo/{old}")
    assert not files.exists(path)
    assert not (store.root / "demo" / old).exists()
    with pytest.raises(VersionNotFound):
        store.load(f"demo@{old}")


def test_a_rollback_is_seen_elsewhere(store: ModelStore, elsewhere: ModelStore) -> None:
    first, second = put(store, 1), put(store, 2)
    for version in (first, second):
        store.promote(f"demo@{version}")
    elsewhere.rollback("demo")
    assert store.aliases("demo") == {"production": first, "previous": second}


def test_a_packed_version_goes_from_a_folder_into_a_bucket(store: ModelStore, tmp_path: Path) -> None:
    local = ModelStore(tmp_path / "local")
    version = put(local)
    pack(local, f"demo@{version}", tmp_path / "demo.tar")
    unpack(store, tmp_path / "demo.tar")
    assert store.load(f"demo@{version}").manifest == local.manifest(f"demo@{version}")
