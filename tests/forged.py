"""Versions and tensor files as somebody might write them who means harm: with whatever hashes they should have."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from model_store.files import entries_of
from model_store.manifest import Manifest, canonical_json, version_of
from model_store.store import ModelStore

LIMITS = {"min_context": 2, "max_context": 512, "max_horizon": 64}


def tensor_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """`header` as it is, or as JSON, behind its length or what is said to be its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def forge(store: ModelStore, config: Any, weights: Any, family: str = "toto", **listed: Any) -> str:
    """Store a version of `evil` without a look at it; its name and version. `listed` replaces entries of its files."""
    contents = {
        "config.json": config if isinstance(config, bytes) else canonical_json(config),
        "weights.safetensors": weights if isinstance(weights, bytes) else save(dict(weights)),
    }
    entries: dict[str, Any] = {name: entry.model_dump() for name, entry in entries_of(contents).items()}
    fields = {
        "model": "evil",
        "family": family,
        "origin": {"kind": "imported", "source": "a stranger"},
        "limits": LIMITS,
        "created_at": "2025-01-01T00:00:00Z",
        "files": entries,
    }
    content = Manifest.model_validate(fields).model_dump(mode="json")
    content["files"] = {name: entry for name, entry in {**entries, **listed}.items() if entry}
    content["version"] = version_of(content)
    home = Path(store.root) / "evil" / content["version"]
    home.mkdir(parents=True)
    for name, written in {**contents, "manifest.json": canonical_json(content)}.items():
        (home / name).write_bytes(written)
    return f"evil@{content['version']}"
