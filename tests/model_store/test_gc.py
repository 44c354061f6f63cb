"""Deletion: what is used by anything stays, and nothing goes unasked."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from model_store.files import StoreError, VersionNotFound
from model_store.gc import collect, unused
from model_store.store import CANDIDATE, ModelStore


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def put(store: ModelStore, number: int, model: str = "demo", **origin: Any) -> str:
    fields = {
        "model": model,
        "family": "naive",
        "origin": {"kind": "trained", "source": "demo.toml", **origin},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "created_at": f"2026-01-02T03:04:{number:02d}+00:00",
    }
    return store.put(fields, {}, {}).version


def gone(store: ModelStore, keep: int = 1) -> set[str]:
    return {manifest.version for manifest in unused(store, keep=keep)}


def test_the_newest_of_every_name_stay(store: ModelStore) -> None:
    versions = [put(store, number) for number in range(5)]
    put(store, 9, "other")
    assert gone(store, keep=3) == set(versions[:2])
    assert {each.version for each in unused(store)} == set(versions[:2])
    with pytest.raises(StoreError, match="at least the newest"):
        gone(store, keep=0)


def test_what_an_alias_points_at_or_has_just_left_stays(store: ModelStore) -> None:
    versions = [put(store, number) for number in range(8)]
    store.promote(f"demo@{versions[0]}")
    store.promote(f"demo@{versions[1]}")
    store.set_alias("demo", CANDIDATE, versions[2])
    store.promote(f"demo@{versions[3]}", symbol="AAPL")
    store.set_shadow("demo", versions[4], 0.1)
    assert gone(store) == {versions[5], versions[6]}


def test_what_a_kept_version_was_made_from_stays_through_every_generation(store: ModelStore) -> None:
    grandparent = put(store, 0, "base")
    parent = put(store, 1, "base", kind="child", revision=grandparent)
    orphan = put(store, 2, "base", kind="child", revision=grandparent)
    put(store, 3, "base")
    put(store, 0, "tuned", revision=parent)
    assert gone(store) == {orphan}


def test_what_a_running_service_holds_stays_until_it_has_been_silent_for_ten_minutes(store: ModelStore) -> None:
    held, free, _ = (put(store, number) for number in range(3))
    store.hold("demo", [held])
    assert gone(store) == {free}
    (lease,) = (store.root / "demo" / "in-use").iterdir()
    content = json.loads(lease.read_bytes())
    for minutes, expected in ((9, {free}), (11, {held, free})):
        at = datetime.now(UTC) - timedelta(minutes=minutes)
        lease.write_text(json.dumps(content | {"at": at.isoformat()}))
        assert gone(store) == expected
    collect(store, keep=2)
    assert not lease.exists()


def test_a_lease_that_cannot_be_read_stops_it(store: ModelStore) -> None:
    put(store, 0)
    (store.root / "demo" / "in-use").mkdir()
    (store.root / "demo" / "in-use" / "host-1.json").write_text("{")
    with pytest.raises(StoreError, match="is not a lease"):
        unused(store)


def test_a_version_that_this_release_cannot_read_stays(store: ModelStore) -> None:
    odd, old, _ = (put(store, number) for number in range(3))
    (store.root / "demo" / odd / "manifest.json").write_text('{"schema_version": 2}')
    assert gone(store) == {old}


def test_collecting_deletes_it_whole_and_leaves_it_in_the_log(store: ModelStore) -> None:
    old, new = put(store, 0), put(store, 1)
    assert [manifest.version for manifest in collect(store, keep=1, reason="disk full")] == [old]
    assert store.versions("demo") == [new]
    with pytest.raises(VersionNotFound):
        store.load(f"demo@{old}")
    assert not [path for path in (store.root / "demo").iterdir() if old in path.name]
    entry = store.log("demo")[-1]
    assert (entry["event"], entry["version"], entry["reason"]) == ("gc", old, "disk full")


def test_a_version_in_use_is_not_deleted_even_when_told_to(store: ModelStore) -> None:
    version = put(store, 0)
    store.promote("demo")
    with pytest.raises(StoreError, match="is in use"):
        store.delete(store.manifest("demo"))
    assert store.versions("demo") == [version]
