"""The store: a version is whole or absent, verified before it is used, and only aliases move."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.manifest import Manifest
from model_store.store import (
    CANDIDATE,
    PRODUCTION,
    ModelStore,
    PromotionRefused,
    StoreError,
    VerificationFailed,
    VersionNotFound,
)

CONFIG = {"network": {"patch_size": 64}, "max_context": 512}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((4, 3), value), "layer.bias": torch.arange(3.0).to(torch.bfloat16)}


def manifest(model: str = "demo", number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "family": "toto",
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "created_at": f"2026-01-02T03:04:{number:02d}+00:00",
        **changes,
    }


def evaluated(
    skill: float,
    low: float | None = None,
    high: float | None = None,
    windows: str = "test",
    name: str = "skill_vs_naive",
) -> dict[str, Any]:
    metric = {"value": skill, "low": low, "high": high}
    return {
        "evaluations": [
            {"windows": windows, "symbols": ["AAPL"], "start": "2010-01-01", "end": "2012-01-01", "interval": "1d",
             "horizon": 64, "origins": 100, "metrics": {name: metric}}
        ]
    }  # fmt: skip


def put(store: ModelStore, number: int = 0, **changes: Any) -> str:
    return store.put(manifest(number=number, **changes), CONFIG, tensors(number)).version


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "artifacts")


@pytest.fixture
def home(store: ModelStore) -> Path:
    """The folder of one stored version."""
    return store.root / "demo" / put(store)


# -- put, find, load ----------------------------------------------------------------------------


def test_what_was_put_is_loaded(store: ModelStore) -> None:
    complete = store.put(manifest(), CONFIG, tensors())
    loaded = store.load(f"demo@{complete.version}")
    assert loaded.manifest == complete
    assert loaded.config == CONFIG
    assert loaded.weights.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded.weights[name].dtype == tensor.dtype
        assert torch.equal(loaded.weights[name], tensor)


def test_a_version_is_a_folder_of_plain_named_files(home: Path) -> None:
    assert sorted(p.name for p in home.iterdir()) == ["config.json", "manifest.json", "weights.safetensors"]
    assert json.loads((home / "manifest.json").read_bytes())["version"] == home.name


def test_a_model_without_weights_stores_none(store: ModelStore) -> None:
    version = store.put(manifest(family="naive"), {}, {}).version
    assert store.load(f"demo@{version}").weights == {}
    assert not (store.root / "demo" / version / "weights.safetensors").exists()


def test_equal_content_is_one_version_whatever_the_order_of_its_tensors(store: ModelStore) -> None:
    first = store.put(manifest(), CONFIG, tensors())
    second = store.put(manifest(), dict(reversed(CONFIG.items())), dict(reversed(tensors().items())))
    assert first == second
    assert store.versions("demo") == [first.version]


def test_a_transposed_view_is_stored_as_its_values(store: ModelStore) -> None:
    matrix = torch.arange(6.0).view(2, 3)
    version = store.put(manifest(), CONFIG, {"m": matrix.T}).version
    assert torch.equal(store.load(f"demo@{version}").weights["m"], matrix.T)


@pytest.mark.parametrize("change", ["config", "weights", "manifest"])
def test_other_content_is_another_version(store: ModelStore, change: str) -> None:
    first = put(store)
    second = store.put(
        manifest(code_revision="x" if change == "manifest" else None),
        {**CONFIG, "max_context": 1} if change == "config" else CONFIG,
        tensors(2.0 if change == "weights" else 0.0),
    ).version
    assert first != second


def test_versions_are_listed_oldest_first_and_models_by_name(store: ModelStore) -> None:
    versions = [put(store, number) for number in (2, 0, 1)]
    store.put(manifest("another"), CONFIG, tensors())
    assert store.versions("demo") == [versions[1], versions[2], versions[0]]
    assert store.models() == ["another", "demo"]
    assert store.versions("unheard-of") == []


def test_a_store_that_does_not_exist_yet_is_empty(store: ModelStore) -> None:
    assert store.models() == []
    assert store.aliases("demo") == {}


def test_equal_tensors_are_found_whatever_else_the_manifest_says(store: ModelStore) -> None:
    older, newer = put(store, 0), store.put(manifest(number=5), CONFIG, tensors(0)).version
    put(store, 7)
    found = store.find("demo", CONFIG, tensors(0))
    assert found is not None
    assert found.version == newer != older
    assert store.find("demo", CONFIG, tensors(0.5)) is None
    assert store.find("demo", {}, tensors(0)) is None
    assert store.find("other", CONFIG, tensors(0)) is None


@pytest.mark.parametrize("name", ["../demo", "demo/../x", ".", "..", "", "Demo", ".hidden", "a" * 65, "a/b", "a\n"])
def test_a_name_that_could_leave_the_store_is_refused(store: ModelStore, name: str) -> None:
    with pytest.raises(VersionNotFound, match="is not a model name"):
        store.resolve(f"{name}@production")


@pytest.mark.parametrize("wanted", ["../x", "0123456789ab", "candidate", "zzz", "aliases.json"])
def test_an_unknown_version_is_answered_with_those_there_are(store: ModelStore, home: Path, wanted: str) -> None:
    with pytest.raises(VersionNotFound, match=f"it has: .*{home.name}"):
        store.resolve(f"demo@{wanted}")


def test_a_nan_in_a_manifest_is_not_stored(store: ModelStore) -> None:
    with pytest.raises(ValueError, match=r"JSON|finite"):
        put(store, **evaluated(float("nan")))
    assert store.versions("demo") == []


# -- corruption fails closed --------------------------------------------------------------------


def refused(store: ModelStore, home: Path, match: str) -> None:
    for read in (store.verify, store.load):
        with pytest.raises(VerificationFailed, match=match):
            read(f"demo@{home.name}")
    with pytest.raises(VerificationFailed, match=match):
        store.promote(f"demo@{home.name}")
    assert store.aliases("demo") == {}


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_flipped_bit_is_refused(store: ModelStore, home: Path, name: str, place: int) -> None:
    data = bytearray((home / name).read_bytes())
    data[place] ^= 1
    (home / name).write_bytes(data)
    refused(store, home, f"{name} is not what was stored")


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_truncated_file_is_refused(store: ModelStore, home: Path, name: str) -> None:
    (home / name).write_bytes((home / name).read_bytes()[:-1])
    refused(store, home, f"{name} is not what was stored")


def test_a_lengthened_file_is_refused(store: ModelStore, home: Path) -> None:
    with open(home / "weights.safetensors", "ab") as file:
        file.write(b"\0")
    refused(store, home, r"weights\.safetensors is not what was stored")


def test_a_missing_file_is_refused(store: ModelStore, home: Path) -> None:
    (home / "weights.safetensors").unlink()
    refused(store, home, r"missing or unlisted: weights\.safetensors")


def test_an_unlisted_file_is_refused(store: ModelStore, home: Path) -> None:
    (home / "model.pkl").write_bytes(b"cos\nsystem\n")
    refused(store, home, r"missing or unlisted: model\.pkl")


def test_a_link_to_the_same_bytes_is_refused(store: ModelStore, home: Path, tmp_path: Path) -> None:
    (home / "config.json").rename(tmp_path / "elsewhere.json")
    (home / "config.json").symlink_to(tmp_path / "elsewhere.json")
    refused(store, home, r"config\.json")


def test_a_linked_manifest_is_refused(store: ModelStore, home: Path, tmp_path: Path) -> None:
    (home / "manifest.json").rename(tmp_path / "elsewhere.json")
    (home / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    refused(store, home, r"manifest\.json")


def test_a_linked_version_is_refused(store: ModelStore, home: Path, tmp_path: Path) -> None:
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    refused(store, home, "is a link")


def test_a_pipe_is_refused_instead_of_waited_for(store: ModelStore, home: Path) -> None:
    (home / "config.json").unlink()
    os.mkfifo(home / "config.json")
    refused(store, home, r"config\.json is not a plain file")


def test_an_edited_manifest_is_refused(store: ModelStore, home: Path) -> None:
    content = json.loads((home / "manifest.json").read_bytes())
    content["origin"]["licence"] = "MIT"
    (home / "manifest.json").write_text(json.dumps(content))
    refused(store, home, "does not hash to its version")


def test_an_edited_manifest_with_its_version_made_to_fit_is_refused(store: ModelStore, home: Path) -> None:
    content = json.loads((home / "manifest.json").read_bytes())
    content["origin"]["licence"] = "MIT"
    content["version"] = Manifest.model_validate(content).digest()
    (home / "manifest.json").write_text(json.dumps(content))
    refused(store, home, "does not hash to its version")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000])
def test_a_manifest_that_is_none_is_refused(store: ModelStore, home: Path, data: bytes) -> None:
    (home / "manifest.json").write_bytes(data)
    refused(store, home, "is not a manifest")


def test_a_version_moved_to_another_name_is_refused(store: ModelStore, home: Path) -> None:
    other = put(store, 1)
    home.rename(store.root / "demo" / "swap")
    (store.root / "demo" / other).rename(home)
    with pytest.raises(VerificationFailed, match="does not hash to its version"):
        store.load(f"demo@{home.name}")


def test_a_version_moved_to_another_model_is_refused(store: ModelStore, home: Path) -> None:
    store.put(manifest("other", 3), CONFIG, tensors())
    home.rename(store.root / "other" / home.name)
    with pytest.raises(VerificationFailed, match="does not hash to its version"):
        store.load(f"other@{home.name}")


def test_a_broken_version_does_not_hide_the_good_ones(store: ModelStore, home: Path) -> None:
    good = put(store, 1)
    (home / "manifest.json").write_bytes(b"{")
    assert store.models() == ["demo"]
    assert store.versions("demo") == [home.name, good]
    found = store.find("demo", CONFIG, tensors(1))
    assert found is not None
    assert found.version == good
    assert store.find("demo", CONFIG, tensors(2)) is None
    assert store.promote("demo")[0].version == good
    assert store.load("demo").manifest.version == good


def test_putting_a_version_again_finds_that_the_stored_one_is_broken(store: ModelStore, home: Path) -> None:
    (home / "config.json").write_bytes(b"{}")
    with pytest.raises(VerificationFailed, match=r"config\.json"):
        put(store)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff", b'{"version": "../../outside"}', b'{"version": ""}', b"[" * 100_000]
)
def test_a_broken_alias_is_refused_and_its_neighbours_are_not(store: ModelStore, home: Path, data: bytes) -> None:
    store.set_alias("demo", CANDIDATE, home.name)
    (home.parent / "aliases" / "production.json").write_bytes(data)
    with pytest.raises(VerificationFailed, match=r"demo: aliases/production\.json is not an alias"):
        store.load("demo")
    assert store.resolve("demo@candidate") == ("demo", home.name)


def test_an_alias_that_is_a_link_is_refused(store: ModelStore, home: Path, tmp_path: Path) -> None:
    store.set_alias("demo", PRODUCTION, home.name)
    alias = home.parent / "aliases" / "production.json"
    alias.rename(tmp_path / "elsewhere.json")
    alias.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(VerificationFailed, match=r"production\.json"):
        store.load("demo")


def test_an_alias_of_a_version_that_is_gone_finds_nothing(store: ModelStore, home: Path) -> None:
    store.set_alias("demo", PRODUCTION, home.name)
    (home.parent / "aliases" / "production.json").write_text('{"version": "ffffffffffff"}')
    with pytest.raises(VersionNotFound, match=f"has no demo@production; it has: .*{home.name}"):
        store.load("demo")


# -- whole or absent ----------------------------------------------------------------------------

_KILLED_PUT = textwrap.dedent("""
    import os, sys, signal
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_store import CONFIG, ModelStore, manifest, tensors

    calls = 0
    def die(*args):
        global calls
        calls += 1
        if calls == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    real = getattr(os, sys.argv[3])
    setattr(os, sys.argv[3], die)
    ModelStore(sys.argv[1]).put(manifest(), CONFIG, tensors())
    print("done")
""")


def killed_put(store: ModelStore, function: str, call: int) -> subprocess.CompletedProcess[str]:
    """Put a version in a process that dies as it calls `os.<function>` for the `call`-th time."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", _KILLED_PUT, str(store.root), here, function, str(call)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("function", "call"), [("fsync", 2), ("rename", 1)])
def test_a_put_killed_before_its_rename_leaves_nothing_to_see(store: ModelStore, function: str, call: int) -> None:
    assert killed_put(store, function, call).returncode == -9
    assert store.models() == []
    assert store.versions("demo") == []
    version = store.put(manifest(), CONFIG, tensors()).version
    assert store.verify(f"demo@{version}").version == version


def test_a_put_killed_after_its_rename_is_whole(store: ModelStore) -> None:
    assert killed_put(store, "fsync", 5).returncode == -9  # three files, their folder, then the parent
    (version,) = store.versions("demo")
    store.verify(f"demo@{version}")


def test_the_same_put_unharmed_succeeds(store: ModelStore) -> None:
    assert killed_put(store, "fsync", 99).stdout == "done\n"


def test_a_put_that_fails_leaves_no_litter(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        put(store)
    assert list((store.root / "demo").iterdir()) == []


def test_an_interrupted_put_leaves_no_litter(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(store)
    assert list((store.root / "demo").iterdir()) == []


# -- aliases and promotion ----------------------------------------------------------------------


def test_an_alias_names_a_version_and_a_bare_name_means_production(store: ModelStore) -> None:
    first, second = put(store, 0), put(store, 1)
    store.set_alias("demo", CANDIDATE, second)
    store.set_alias("demo", PRODUCTION, first)
    assert store.resolve("demo") == ("demo", first)
    assert store.resolve("demo@candidate") == ("demo", second)
    assert store.aliases("demo") == {"candidate": second, "production": first}


def test_an_alias_of_an_alias_is_the_version_behind_it(store: ModelStore, home: Path) -> None:
    store.set_alias("demo", CANDIDATE, home.name)
    store.set_alias("demo", "champion", CANDIDATE)
    assert store.aliases("demo")["champion"] == home.name


@pytest.mark.usefixtures("home")
def test_an_alias_of_no_version_is_not_set(store: ModelStore) -> None:
    with pytest.raises(VersionNotFound):
        store.set_alias("demo", CANDIDATE, "0" * 12)
    assert store.aliases("demo") == {}


@pytest.mark.parametrize(
    "alias", ["", "0123456789ab", "012345678901", "Production", "a b", "../x", "..", "A/B", "A" * 33, "previous"]
)
def test_a_name_that_cannot_be_an_alias_is_refused(store: ModelStore, home: Path, alias: str) -> None:
    with pytest.raises(StoreError, match="cannot be an alias"):
        store.set_alias("demo", alias, home.name)


def test_promotion_moves_production_and_keeps_the_old_version_as_previous(store: ModelStore) -> None:
    first, second = put(store, 0), put(store, 1)
    store.promote(f"demo@{first}")
    assert store.aliases("demo") == {"production": first}
    store.promote(f"demo@{second}")
    assert store.aliases("demo") == {"production": second, "previous": first}


def test_promoting_what_is_in_production_changes_nothing(store: ModelStore) -> None:
    first, second = put(store, 0), put(store, 1)
    for version in (first, second, second):
        store.promote(f"demo@{version}")
    assert store.aliases("demo") == {"production": second, "previous": first}


def test_a_bare_name_promotes_the_candidate_or_else_the_newest(store: ModelStore) -> None:
    versions = [put(store, number) for number in range(3)]
    assert store.promote("demo")[0].version == versions[2]
    store.set_alias("demo", CANDIDATE, versions[1])
    assert store.promote("demo")[0].version == versions[1]


def test_a_symbol_has_a_version_of_its_own_that_is_promoted_by_itself(store: ModelStore) -> None:
    first, second, third = (put(store, number) for number in range(3))
    store.promote(f"demo@{first}")
    store.promote(f"demo@{second}", symbol="BRK.B")
    store.promote(f"demo@{third}", symbol="^GSPC")
    assert store.aliases("demo") == {"production": first, "BRK.B": second, "^GSPC": third}
    assert store.resolve("demo@BRK.B") == ("demo", second)
    with pytest.raises(VersionNotFound):
        store.resolve("demo@AAPL")


@pytest.mark.parametrize("symbol", ["aapl", "", "../X", "012345678901", "A B"])
def test_a_symbol_that_is_none_gets_no_version(store: ModelStore, home: Path, symbol: str) -> None:
    with pytest.raises(StoreError, match="cannot have a version of its own"):
        store.promote(f"demo@{home.name}", symbol=symbol)
    assert store.aliases("demo") == {}


def test_a_symbols_version_must_be_as_good_as_what_serves_the_symbol_now(store: ModelStore) -> None:
    base, better, between = (put(store, n, **evaluated(skill)) for n, skill in enumerate((0.01, 0.03, 0.02)))
    store.promote(f"demo@{base}")
    store.promote(f"demo@{better}", symbol="AAPL")
    with pytest.raises(PromotionRefused, match=r"is \+0\.0200.*\+0\.0300"):
        store.promote(f"demo@{between}", symbol="AAPL")
    store.promote(f"demo@{between}", symbol="IBM")
    store.promote(f"demo@{between}")
    assert store.aliases("demo") == {"production": between, "previous": base, "AAPL": better, "IBM": between}


def test_a_shadow_has_a_share_until_it_is_ended(store: ModelStore, home: Path) -> None:
    assert store.shadow("demo") is None
    store.set_alias("demo", CANDIDATE, home.name)
    store.set_shadow("demo", CANDIDATE, 0.25)
    assert store.shadow("demo") == (home.name, 0.25)
    assert store.resolve("demo@shadow") == ("demo", home.name)
    store.end_shadow("demo")
    store.end_shadow("demo")
    assert store.shadow("demo") is None
    assert [entry["version"] for entry in audit(store, "shadow")] == [home.name, None]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(store: ModelStore, home: Path, share: float) -> None:
    with pytest.raises(StoreError, match="share of a shadow"):
        store.set_shadow("demo", home.name, share)


def test_the_stamp_moves_with_every_alias_and_with_nothing_else(store: ModelStore) -> None:
    assert store.stamp("demo") == ""
    first, second = put(store, 0), put(store, 1)
    changes = [
        lambda: store.set_alias("demo", CANDIDATE, second),
        lambda: store.promote(f"demo@{first}"),
        lambda: store.promote(f"demo@{second}"),
        lambda: store.promote(f"demo@{first}"),
        lambda: store.promote(f"demo@{second}", symbol="AAPL"),
        lambda: store.set_shadow("demo", second, 0.1),
        lambda: store.set_shadow("demo", second, 0.2),
        lambda: store.end_shadow("demo"),
    ]
    stamps = [store.stamp("demo")]
    for change in changes:
        change()
        stamps.append(store.stamp("demo"))
    assert len(set(stamps)) == len(stamps)
    put(store, 2)
    store.aliases("demo")
    store.verify("demo")
    assert store.stamp("demo") == stamps[-1]


def test_promoting_previous_takes_the_last_promotion_back(store: ModelStore) -> None:
    first, second = put(store, 0), put(store, 1)
    store.promote(f"demo@{first}")
    store.promote(f"demo@{second}")
    store.promote("demo@previous")
    assert store.aliases("demo") == {"production": first, "previous": second}


def test_rollback_serves_what_served_before_and_done_twice_is_undone(store: ModelStore) -> None:
    first, second = put(store, 0), put(store, 1)
    store.promote(f"demo@{first}")
    store.promote(f"demo@{second}")
    assert store.rollback("demo", reason="too slow").version == first
    assert store.aliases("demo") == {"production": first, "previous": second}
    store.rollback("demo")
    assert store.aliases("demo") == {"production": second, "previous": first}
    entries = audit(store, "rollback")
    assert [(e["version"], e["previous"], e.get("reason")) for e in entries] == [
        (first, second, "too slow"),
        (second, first, None),
    ]


def test_a_symbol_is_rolled_back_by_itself_at_last_to_what_serves_all(store: ModelStore) -> None:
    base, first, second = (put(store, number) for number in range(3))
    store.promote(f"demo@{base}")
    store.promote(f"demo@{first}", symbol="AAPL")
    store.promote(f"demo@{second}", symbol="AAPL")
    assert store.rollback("demo", symbol="AAPL").version == first
    assert store.aliases("demo")["AAPL"] == first
    store.promote(f"demo@{second}", symbol="IBM")
    assert store.rollback("demo", symbol="IBM").version == base
    assert store.aliases("demo") == {"production": base, "AAPL": first}


def test_without_anything_before_there_is_no_rollback(store: ModelStore, home: Path) -> None:
    for symbol in (None, "AAPL"):
        with pytest.raises(VersionNotFound, match="nothing served before"):
            store.rollback("demo", symbol=symbol)
    store.promote(f"demo@{home.name}")
    with pytest.raises(VersionNotFound, match="nothing served before as demo"):
        store.rollback("demo")
    assert store.aliases("demo") == {"production": home.name}


def test_a_rollback_to_broken_bytes_is_refused(store: ModelStore, home: Path) -> None:
    store.promote(f"demo@{home.name}")
    second = put(store, 1)
    store.promote(f"demo@{second}")
    (home / "config.json").write_bytes(b"{}")
    with pytest.raises(VerificationFailed, match=r"config\.json"):
        store.rollback("demo")
    assert store.aliases("demo") == {"production": second, "previous": home.name}


def test_promoting_an_unknown_model_is_refused(store: ModelStore) -> None:
    with pytest.raises(VersionNotFound, match="no model called demo"):
        store.promote("demo")


@pytest.mark.parametrize(
    ("before", "after", "passes"),
    [
        (evaluated(0.02), evaluated(0.03), True),
        (evaluated(0.02), evaluated(0.02), True),
        (evaluated(0.02), evaluated(0.01), False),
        (evaluated(0.02), evaluated(0.01, -0.01, 0.03), True),  # the difference is within the noise
        (evaluated(0.02), evaluated(0.01, -0.01, 0.015), False),
        (evaluated(0.02), {}, False),  # never evaluated
        (evaluated(0.02), evaluated(0.5, windows="unseen"), False),  # evaluated on something else
        (evaluated(-0.02), evaluated(-0.01), True),
        ({}, evaluated(-0.5), True),
        ({}, {}, True),
    ],
)
def test_the_gate(store: ModelStore, before: dict[str, Any], after: dict[str, Any], passes: bool) -> None:
    first, second = put(store, 0, **before), put(store, 1, **after)
    store.promote(f"demo@{first}")
    if passes:
        store.promote(f"demo@{second}")
        assert store.resolve("demo")[1] == second
        return
    with pytest.raises(PromotionRefused, match=r"skill_vs_naive on the test windows.*--force REASON|no skill_vs_naive"):
        store.promote(f"demo@{second}")
    assert store.aliases("demo") == {"production": first}


@pytest.mark.parametrize(
    "change",
    [
        {"start": "2011-01-01"},
        {"end": "2011-01-01"},
        {"interval": "1h"},
        {"horizon": 8},
        {"origins": 99},
        {"symbols": ["AAPL", "IBM"]},
    ],
)
def test_a_better_score_on_another_test_set_is_no_reason(store: ModelStore, change: dict[str, Any]) -> None:
    store.promote(f"demo@{put(store, 0, **evaluated(0.01))}")
    other = evaluated(0.5)["evaluations"][0] | change
    with pytest.raises(PromotionRefused, match=r"another test set than the current version .*--force REASON"):
        store.promote(f"demo@{put(store, 1, evaluations=[other])}")
    both = [other, *evaluated(0.02)["evaluations"]]
    store.promote(f"demo@{put(store, 2, evaluations=both)}")


@pytest.mark.parametrize(("gain", "high", "passes"), [(0.03, None, True), (-0.01, 0.01, True), (-0.03, -0.01, False)])
def test_what_was_tuned_from_the_current_version_is_judged_beside_it_on_the_windows_of_its_own(
    store: ModelStore, gain: float, high: float | None, passes: bool
) -> None:
    first = put(store, 0, **evaluated(0.5))
    store.promote(f"demo@{first}")
    [own] = evaluated(gain, None, high, name="skill_vs_base")["evaluations"]
    tuned = {"origin": {"kind": "trained", "source": "each.toml", "revision": first}}
    second = put(store, 1, **tuned, evaluations=[own | {"symbols": ["MSFT"]}])
    stranger = put(store, 2, evaluations=[own | {"symbols": ["MSFT"]}])
    with pytest.raises(PromotionRefused, match="no skill_vs_naive"):
        store.promote(f"demo@{stranger}")
    if passes:
        store.promote(f"demo@{second}")
        return
    with pytest.raises(PromotionRefused, match=r"skill_vs_base on the test windows is -0.0300 \(at most -0.0100\)"):
        store.promote(f"demo@{second}")


def test_every_window_of_the_current_version_must_hold(store: ModelStore) -> None:
    both = {"evaluations": evaluated(0.01)["evaluations"] + evaluated(0.02, windows="unseen")["evaluations"]}
    store.promote(f"demo@{put(store, 0, **both)}")
    with pytest.raises(PromotionRefused, match="unseen"):
        store.promote(f"demo@{put(store, 1, **evaluated(0.5))}")


def test_a_reason_overrides_the_gate_and_is_recorded(store: ModelStore) -> None:
    first, second = put(store, 0, **evaluated(0.02)), put(store, 1, **evaluated(-0.3))
    store.promote(f"demo@{first}")
    store.promote(f"demo@{second}", force="the old one needs a missing GPU")
    assert store.aliases("demo") == {"production": second, "previous": first}
    assert audit(store)[-1]["force"] == "the old one needs a missing GPU"


@pytest.mark.parametrize("reason", ["", "  "])
def test_an_override_without_a_reason_is_refused(store: ModelStore, home: Path, reason: str) -> None:
    with pytest.raises(PromotionRefused, match="needs a reason"):
        store.promote(f"demo@{home.name}", force=reason)


def test_no_reason_overrides_broken_bytes(store: ModelStore, home: Path) -> None:
    (home / "config.json").write_bytes(b"{}")
    with pytest.raises(VerificationFailed):
        store.promote(f"demo@{home.name}", force="I know better")
    assert store.aliases("demo") == {}


def audit(store: ModelStore, event: str = "") -> list[dict[str, Any]]:
    return [entry for entry in store.log("demo") if event in ("", entry["event"])]


def test_each_promotion_leaves_an_object_that_says_who_when_what_and_why(store: ModelStore) -> None:
    first, second = put(store, 0), put(store, 1)
    store.promote(f"demo@{first}")
    store.promote(f"demo@{second}", reason="a longer context")
    store.promote(f"demo@{first}", symbol="AAPL")
    entries = audit(store, "promote")
    assert [(e["version"], e["previous"], e.get("symbol"), e.get("reason")) for e in entries] == [
        (first, None, None, None),
        (second, first, None, "a longer context"),
        (first, second, "AAPL", None),
    ]
    assert all("@" in e["by"] and e["at"].endswith("+00:00") for e in entries)


# -- several processes at once ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(4, mp_context=get_context("forkserver")) as executor:
        yield executor


def _put_in_process(root: str, number: int) -> str:
    return ModelStore(root).put(manifest(number=number), CONFIG, tensors(number)).version


def _promote_in_process(root: str, version: str) -> str:
    return ModelStore(root).promote(f"demo@{version}")[0].version


def test_processes_that_store_the_same_version_at_once_all_succeed(
    store: ModelStore, pool: ProcessPoolExecutor
) -> None:
    versions = set(pool.map(_put_in_process, [str(store.root)] * 16, [number % 2 for number in range(16)]))
    assert len(versions) == 2
    assert set(store.versions("demo")) == versions
    assert [p for p in (store.root / "demo").iterdir() if p.name.startswith(".put-")] == []
    for version in versions:
        store.verify(f"demo@{version}")


def test_no_promotion_of_many_at_once_is_lost(store: ModelStore, pool: ProcessPoolExecutor) -> None:
    versions = [put(store, number) for number in range(8)]
    list(pool.map(_promote_in_process, [str(store.root)] * 8, versions))
    entries = audit(store, "promote")
    assert sorted(entry["version"] for entry in entries) == sorted(versions)
    succession = {entry["previous"]: entry["version"] for entry in entries}
    assert len(succession) == 8, "two promotions replaced the same version"
    chain, link = [], succession.get(None)
    while link:
        chain.append(link)
        link = succession.get(link)
    assert sorted(chain) == sorted(versions)
    assert store.aliases("demo") == {"production": chain[-1], "previous": chain[-2]}
