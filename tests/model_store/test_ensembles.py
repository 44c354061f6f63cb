"""Versions that name others: they load, pass the gate and are deleted only together with what they blend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_store.diff import differences
from model_store.files import VerificationFailed
from model_store.gate import PromotionRefused
from model_store.gc import collect, unused
from model_store.manifest import Manifest
from model_store.store import ModelStore
from model_store.tar import pack, unpack
from models.ensemble import EnsembleForecaster

HALVES = [[0.5, 0.5], [0.5, 0.5]]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def put(store: ModelStore, model: str, number: int = 0) -> str:
    fields = {
        "model": model,
        "family": "naive",
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": {"min_context": 2, "max_context": 4096, "max_horizon": 512},
        "created_at": f"2026-01-02T03:04:{number:02d}+00:00",
    }
    version = store.put(fields, {}, {}).version
    store.promote(f"{model}@{version}", force="test")
    return version


@pytest.fixture
def ensemble(store: ModelStore, put_ensemble: Callable[..., Manifest]) -> Manifest:
    for name in ("first", "second"):
        put(store, name)
    return put_ensemble(store, ["first", "second"], HALVES)


def test_an_ensemble_is_loaded_with_its_members_and_passes_the_gate(store: ModelStore, ensemble: Manifest) -> None:
    found = store.load("ensemble")
    assert [f"{each.manifest.model}@{each.manifest.version}" for each in found.members] == found.config["members"]
    assert isinstance(found.build(), EnsembleForecaster)
    assert store.load("ensemble", alone=True).members == ()
    assert store.verify("ensemble") == ensemble
    _, notes = store.promote("ensemble")
    assert notes == ["it forecasts as it did where it was stored"]


def test_collection_keeps_what_an_ensemble_in_use_blends(store: ModelStore, ensemble: Manifest) -> None:
    members = {member.partition("@")[2] for member in store.config(ensemble)["members"]}
    for number in range(1, 4):
        for name in ("first", "second"):
            put(store, name, number)
    assert not members & {manifest.version for manifest in unused(store, keep=1)}
    collect(store, keep=1)
    assert store.verify("ensemble") == ensemble


def test_what_a_forgotten_ensemble_blended_goes_with_it(
    store: ModelStore, ensemble: Manifest, put_ensemble: Callable[..., Manifest]
) -> None:
    members = {member.partition("@")[2] for member in store.config(ensemble)["members"]}
    for number in (1, 2):  # so that neither the production nor the previous one is the first
        for name in ("first", "second"):
            put(store, name, number)
        put_ensemble(store, ["first", "second"], [[0.1 * number, 1 - 0.1 * number]] * 2)
    put(store, "first", 3)
    put(store, "second", 3)
    assert members | {ensemble.version} <= {manifest.version for manifest in unused(store, keep=1)}


@pytest.mark.parametrize("act", ["verify", "load", "promote"])
def test_an_ensemble_without_one_of_its_members_is_refused(store: ModelStore, ensemble: Manifest, act: str) -> None:
    member = store.manifest(store.config(ensemble)["members"][0])
    (store.root / "first" / "aliases" / "production.json").unlink()
    store.delete(member)
    with pytest.raises((VerificationFailed, PromotionRefused), match=f"first@{member.version}"):
        getattr(store, act)(f"ensemble@{ensemble.version}")


def test_a_damaged_member_is_found_by_verifying_the_ensemble(store: ModelStore, ensemble: Manifest) -> None:
    member = store.config(ensemble)["members"][1]
    (store.root / member.replace("@", "/") / "config.json").write_text("[]")
    with pytest.raises(VerificationFailed, match=member):
        store.verify("ensemble")


@pytest.mark.parametrize(
    "config",
    [
        {"members": ["first@production", "second@production"], "weights": HALVES, "max_horizon": 30},
        {"members": ["first", "second"], "weights": HALVES, "max_horizon": 30},
        {"weights": HALVES, "max_horizon": 30},
        {"members": ["ensemble", "ensemble"], "weights": HALVES, "max_horizon": 30},
        {"members": "both", "weights": [[0.9, 0.9]] * 2, "max_horizon": 30},
        {"members": "both", "weights": HALVES, "max_horizon": 31},
        {"members": "both", "weights": HALVES},
    ],
    ids=["aliases", "names", "no members", "ensembles", "weights", "too far", "no horizon"],
)
def test_a_config_that_is_no_blend_does_not_load(store: ModelStore, ensemble: Manifest, config: dict[str, Any]) -> None:
    exact = {"both": store.config(ensemble)["members"], "ensemble": [f"ensemble@{ensemble.version}"] * 2}
    members = config.get("members")
    if members == "both" or (members and members[0] == "ensemble"):
        config = config | {"members": exact["both" if members == "both" else "ensemble"]}
    fields = ensemble.model_dump(exclude={"version", "files"}) | {"model": "broken"}
    version = store.put(fields, config, {}).version
    with pytest.raises(VerificationFailed, match=f"broken@{version}"):
        store.load(f"broken@{version}").build()


def test_a_packed_ensemble_needs_its_members_where_it_goes(
    tmp_path: Path, store: ModelStore, ensemble: Manifest
) -> None:
    pack(store, "ensemble", tmp_path / "ensemble.tar")
    there = ModelStore(tmp_path / "there")
    unpack(there, tmp_path / "ensemble.tar")
    with pytest.raises(VerificationFailed, match="the store has no first@"):
        there.load(f"ensemble@{ensemble.version}")
    for member in store.config(ensemble)["members"]:
        pack(store, member, tmp_path / f"{member}.tar")
        unpack(there, tmp_path / f"{member}.tar")
    assert len(there.load(f"ensemble@{ensemble.version}").members) == 2


def test_weights_and_members_are_what_two_ensembles_differ_in(
    store: ModelStore, ensemble: Manifest, put_ensemble: Callable[..., Manifest]
) -> None:
    other = put_ensemble(store, ["second", "first"], [[0.25, 0.75]] * 2)
    rows = {what: (one, two) for what, one, two in differences(ensemble, other, *map(store.config, (ensemble, other)))}
    assert rows["config.weights"] == ("[0.5, 0.5], [0.5, 0.5]", "[0.25, 0.75], [0.25, 0.75]")
    assert "config.members" in rows
