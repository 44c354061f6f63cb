"""The format is what its page says: another implementation, written from the page alone, reads and writes it."""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from model_store.manifest import Manifest
from model_store.store import ModelStore

PACKAGE = Path(__file__).parents[2] / "model_store"
GOLDEN = "d45ac379a11f"  # pragma: allowlist secret # if this changes, no stored version verifies any more


# -- a second implementation: nothing below, up to the tests, knows the first ----------------------


def canonical(content: Any) -> bytes:
    """Canonical JSON by hand."""
    if isinstance(content, dict):
        pairs = (canonical(key) + b":" + canonical(content[key]) for key in sorted(content))
        return b"{" + b",".join(pairs) + b"}"
    if isinstance(content, list):
        return b"[" + b",".join(map(canonical, content)) + b"]"
    if isinstance(content, str):
        plain = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
        units = [unit for (unit,) in struct.iter_unpack("<H", content.encode("utf-16-le"))]
        text = (plain.get(chr(u)) or (chr(u) if 32 <= u < 127 else f"\\u{u:04x}") for u in units)
        return ('"' + "".join(text) + '"').encode()
    if content is None or isinstance(content, bool):
        return {None: b"null", True: b"true", False: b"false"}[content]
    return repr(content).encode()


def version_by_the_page(manifest: dict[str, Any]) -> str:
    kept = {key: value for key, value in manifest.items() if key != "version"}
    return hashlib.sha256(canonical(kept)).hexdigest()[:12]


def safetensors(name: str, values: list[float]) -> bytes:
    """One float32 tensor."""
    header = {name: {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, 4 * len(values)]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(values)}f", *values)


def write_by_the_page(root: Path, manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {**manifest, "files": listed}
    version = version_by_the_page(manifest)
    home = root / manifest["model"] / ".put-elsewhere"
    home.mkdir(parents=True)
    for name, data in {**files, "manifest.json": canonical({**manifest, "version": version})}.items():
        (home / name).write_bytes(data)
    home.rename(home.with_name(version))
    return version


# -- and what it agrees on with the first -----------------------------------------------------------


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": "demo",
        "family": "toto",
        "origin": {"kind": "trained", "source": 'Übung \U0001f600 "x".toml'},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "serving": {
            "temperature": 1e-07,
            "top_p": 0.1,
            "large": 1e16,
            "odd": "\x7f/\x00",
            "samples": 32,
            "stratified": True,
            "note": None,
        },
        "created_at": "2026-01-02T03:04:05+00:00",
        **changes,
    }


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def test_the_store_loads_what_was_written_by_the_page(store: ModelStore) -> None:
    files = {"config.json": canonical({"a": [1, 2.5]}), "weights.safetensors": safetensors("w", [1.0, -2.0])}
    version = write_by_the_page(store.root, fields(), files)
    assert version == GOLDEN
    assert store.versions("demo") == [version]
    loaded = store.load(f"demo@{version}")
    assert loaded.config == {"a": [1, 2.5]}
    assert torch.equal(loaded.weights["w"], torch.tensor([1.0, -2.0]))
    aliases = store.root / "demo" / "aliases"
    aliases.mkdir()
    (aliases / "production.json").write_bytes(canonical({"version": version, "previous": version}))
    assert store.resolve("demo") == store.resolve("demo@previous") == ("demo", version)


def test_the_page_reads_what_the_store_wrote(store: ModelStore) -> None:
    given = {key: value for key, value in fields().items() if key != "schema_version"}
    version = store.put(given, {"b": 1, "a": "ü"}, {"w": torch.tensor([3.0])}).version
    store.promote(f"demo@{version}", reason="a test")
    home = store.root / "demo" / version
    data = (home / "manifest.json").read_bytes()
    manifest = json.loads(data)
    assert data == canonical(manifest)
    assert manifest["version"] == version == version_by_the_page(manifest)
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(path.name for path in home.iterdir())
    for name, entry in manifest["files"].items():
        content = (home / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (home / "config.json").read_bytes() == canonical({"a": "ü", "b": 1})
    assert (store.root / "demo" / "aliases" / "production.json").read_bytes() == canonical({"version": version})
    for path in (store.root / "demo" / "audit").iterdir():
        entry = json.loads(path.read_bytes())
        assert path.read_bytes() == canonical(entry)
        assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z-(put|promote)-[0-9a-f]{8}\.json", path.name)


def test_defaults_that_a_reader_knows_are_not_part_of_what_is_hashed(store: ModelStore) -> None:
    version = write_by_the_page(store.root, fields(), {"config.json": b"{}"})
    assert store.verify(f"demo@{version}").evaluations == ()
    assert b"evaluations" not in (store.root / "demo" / version / "manifest.json").read_bytes()


def test_the_published_schema_is_the_manifests() -> None:
    published = json.loads((PACKAGE / "manifest.schema.json").read_bytes())
    assert published == Manifest.model_json_schema(), "candlecast store schema > model_store/manifest.schema.json"
    jsonschema.Draft202012Validator.check_schema(published)


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"family": "lstm"}, False),
        ({"surprise": 1}, False),
        ({"files": {"../evil": {"bytes": 1, "sha256": "0" * 64}}}, False),
        ({"files": {"config.json": {"bytes": -1, "sha256": "0" * 64}}}, False),
        ({"files": {"config.json": {"bytes": 1, "sha256": "0" * 63}}}, False),
        ({"limits": {"min_context": 2}}, False),
        ({"model": "../demo"}, False),
    ],
)
def test_the_schema_refuses_what_the_store_refuses(change: dict[str, Any], valid: bool) -> None:
    content = fields(files={}, version="0" * 12, **change) if "files" not in change else fields(**change)
    schema = json.loads((PACKAGE / "manifest.schema.json").read_bytes())
    assert jsonschema.Draft202012Validator(schema).is_valid(content) == valid
    try:
        Manifest.model_validate(content)
    except ValueError:
        assert not valid
    else:
        assert valid
