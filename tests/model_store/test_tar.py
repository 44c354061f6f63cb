"""A version as one file: the same bytes everywhere, and nothing comes out that did not go in."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from model_store.files import VerificationFailed, entries_of
from model_store.manifest import MANIFEST, canonical_json, version_of
from model_store.store import ModelStore, parse_manifest
from model_store.tar import pack, unpack

# Of the version below: a tar that was packed by another release, or on another machine, has the same bytes.
GOLDEN = "ca75fcb5700599e643241316d72e02cfd9773434859e771b7c6a9f5b20ed1a39"  # pragma: allowlist secret


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def other(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "other")


@pytest.fixture
def packed(store: ModelStore, tmp_path: Path) -> Path:
    """A version of literal bytes, whose name and version begin every member's name."""
    contents = {"config.json": b'{"a":1}', "weights.safetensors": save({"w": torch.arange(300.0)})}
    fields = {
        "model": "demo",
        "family": "toto",
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "files": {name: entry.model_dump() for name, entry in entries_of(contents).items()},
        "created_at": "2026-01-02T03:04:05+00:00",
    }
    version = version_of(fields)
    data = canonical_json({**fields, "version": version})
    store.put_files(parse_manifest(data, "demo", version), {**contents, MANIFEST: data}, reason="a test")
    pack(store, f"demo@{version}", tmp_path / "demo.tar")
    return tmp_path / "demo.tar"


Member = tuple[tarfile.TarInfo, bytes]


def members_of(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        found = []
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found.append((member, file.read()))
    return found


def write(path: Path, members: list[Member]) -> None:
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            if member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def member(name: str, data: bytes = b"", **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def test_what_was_packed_here_is_the_same_version_there(store: ModelStore, other: ModelStore, packed: Path) -> None:
    manifest = unpack(other, packed)
    (version,) = store.versions("demo")
    assert manifest == store.manifest(f"demo@{version}")
    assert torch.equal(other.load(f"demo@{version}").weights["w"], torch.arange(300.0))
    for name in ("manifest.json", "config.json", "weights.safetensors"):
        one, two = ((each.root / "demo" / version / name).read_bytes() for each in (store, other))
        assert one == two
    assert unpack(other, packed) == manifest
    (entry,) = other.log("demo")
    assert (entry["event"], entry["version"], entry["reason"]) == ("put", version, "unpacked from demo.tar")


def test_the_bytes_are_the_versions_alone(store: ModelStore, packed: Path) -> None:
    assert hashlib.sha256(packed.read_bytes()).hexdigest() == GOLDEN
    names = [info.name.rpartition("/")[2] for info, _ in members_of(packed)]
    assert names == ["manifest.json", "config.json", "weights.safetensors"]
    with pytest.raises(FileExistsError):
        pack(store, f"demo@{store.versions('demo')[0]}", packed)


def test_runtimes_stay_behind_and_are_dropped(
    store: ModelStore, other: ModelStore, packed: Path, tmp_path: Path
) -> None:
    (version,) = store.versions("demo")
    runtime = store.root / "demo" / version / "runtimes" / "compiled"
    runtime.mkdir(parents=True)
    (runtime / "step.pt2").write_bytes(b"native code")
    again = tmp_path / "again.tar"
    pack(store, f"demo@{version}", again)
    assert again.read_bytes() == packed.read_bytes()
    write(again, [*members_of(packed), member(f"demo/{version}/runtimes/compiled/step.pt2", b"native code")])
    unpack(other, again)
    assert not (other.root / "demo" / version / "runtimes").exists()


def changed(index: int, data: bytes) -> Callable[[list[Member]], list[Member]]:
    def change(members: list[Member]) -> list[Member]:
        return [(info, data if place == index else kept) for place, (info, kept) in enumerate(members)]

    return change


def added(name: str, data: bytes = b"x", **fields: object) -> Callable[[list[Member]], list[Member]]:
    """A member at the end whose name may speak of HOME, the version's own folder."""

    def change(members: list[Member]) -> list[Member]:
        home = members[0][0].name.rpartition("/")[0]
        return [*members, member(name.replace("HOME", home), data, **fields)]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed(2, b"x"), "weights.safetensors is not what was stored"),
        (changed(2, b"x" * 1400), "weights.safetensors is not what was stored"),
        (changed(1, b'{"a":2}'), "config.json is not what was stored"),
        (changed(0, b"{}"), "is not a manifest"),
        (lambda members: members[1:], "begins with its manifest"),
        (lambda members: members[:2], "missing: weights.safetensors"),
        (lambda members: [members[1], members[0], members[2]], "begins with its manifest"),
        (lambda members: [*members, members[1]], "config.json is unlisted"),
        (lambda members: [], "begins with its manifest"),
        (added("HOME/model.pkl"), "model.pkl is unlisted"),
        (added("HOME/deep/config.json"), "is unlisted"),
        (added("demo/0123456789ab/config.json"), "is unlisted"),
        (added("HOME/../../../evil"), "is no name of a version's file"),
        (added("/etc/evil/x"), "is no name of a version's file"),
        (added("../../evil"), "is no name of a version's file"),
        (added("evil"), "is no name of a version's file"),
        (added("HOME/runtimes/../../x"), "is no name of a version's file"),
        (added("HOME/runtimes/x", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is not a plain file"),
        (added("HOME/x", b"", type=tarfile.LNKTYPE, linkname="HOME/config.json"), "is not a plain file"),
        (added("HOME/x", b"", type=tarfile.CHRTYPE), "is not a plain file"),
        (added("HOME/x", b"", type=tarfile.FIFOTYPE), "is not a plain file"),
        (added("HOME/x", b"", type=tarfile.DIRTYPE), "is not a plain file"),
    ],
)
def test_a_tar_that_holds_anything_else_is_refused_and_nothing_is_stored(
    other: ModelStore, packed: Path, tmp_path: Path, change: Callable[[list[Member]], list[Member]], match: str
) -> None:
    hostile = tmp_path / "hostile.tar"
    write(hostile, change(members_of(packed)))
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(VerificationFailed, match=f"hostile.tar.*{match}"):
        unpack(other, hostile)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("length", [0, 100, 512, 1000, 3000])
def test_a_truncated_tar_is_refused(other: ModelStore, packed: Path, tmp_path: Path, length: int) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(packed.read_bytes()[:length])
    with pytest.raises(VerificationFailed, match=r"cut\.tar"):
        unpack(other, cut)
    assert other.models() == []


def test_a_compressed_tar_is_refused_unread(other: ModelStore, packed: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bomb.tar", "w:gz") as tar:
        tar.add(packed, "demo/0123456789ab/manifest.json")
    with pytest.raises(VerificationFailed, match="is not a packed version"):
        unpack(other, tmp_path / "bomb.tar")


def test_a_member_that_claims_more_than_there_is_is_refused(other: ModelStore, packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "strict")
    info.size = 2**40
    data[:512] = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "claims.tar").write_bytes(data)
    with pytest.raises(VerificationFailed, match=r"claims\.tar"):
        unpack(other, tmp_path / "claims.tar")
