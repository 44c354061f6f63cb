"""The manifest: strict, and equal content gives an equal version for ever."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from model_store.manifest import Evaluation, Manifest, canonical_json, version_of

GOLDEN = "0a61a0039efe"


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "model": "toto-demo",
        "family": "toto",
        "origin": {"kind": "trained", "source": "toto-demo.toml"},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "files": {"config.json": {"bytes": 2, "sha256": "4413" * 16}},
        "created_at": "2026-01-02T03:04:05+00:00",
        **changes,
    }  # fmt: skip


def evaluation(windows: str) -> dict[str, Any]:
    return {
        "windows": windows, "symbols": ["AAPL"], "start": "2010-01-01", "end": "2012-01-01", "interval": "1d",
        "horizon": 64, "origins": 100, "metrics": {"skill_vs_naive": {"value": 0.01, "low": -0.01, "high": 0.03}},
    }  # fmt: skip


def stored(**changes: Any) -> dict[str, Any]:
    """The object that lies in manifest.json."""
    content: dict[str, Any] = json.loads(
        canonical_json(Manifest.model_validate(fields(**changes)).model_dump(mode="json"))
    )
    return content


def test_the_digest_of_a_stored_manifest_is_the_one_it_has_always_been() -> None:
    # What every store out there holds: if this changes, no stored version verifies any more.
    golden = {**fields(), "schema_version": 1, "serving": {"samples": 32}, "training": None, "évaluations": "é"}
    assert version_of(golden) == GOLDEN


def test_the_version_is_the_digest_of_everything_but_itself() -> None:
    content = stored()
    assert version_of(content) == version_of({**content, "version": "0123456789ab"})
    assert version_of(content) == Manifest.model_validate(content).digest()


def test_the_order_of_keys_does_not_matter() -> None:
    content = stored()
    assert version_of(dict(reversed(content.items()))) == version_of(content)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"family": "kronos"},
        {"created_at": "2026-01-02T03:04:06+00:00"},
        {"limits": {"min_context": 3, "max_context": 512, "max_horizon": 64}},
        {"serving": {"samples": 16}},
        {"evaluations": [evaluation("test")]},
        {"code_revision": "abc"},
        {"files": {}},
    ],
)
def test_any_change_is_another_version(change: dict[str, Any]) -> None:
    assert version_of(stored(**change)) != version_of(stored())


def test_a_field_of_a_later_release_does_not_change_the_version_of_what_is_stored() -> None:
    content = stored()
    del content["code_revision"]  # stored by a release that did not know it
    reread = Manifest.model_validate(content)
    assert reread.code_revision is None
    assert version_of(content) != reread.digest(), "so a reader must hash what it read, not what it parsed"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"model": "Toto"}, "model"),
        ({"model": "../toto"}, "model"),
        ({"model": ""}, "model"),
        ({"model": "a\n"}, "model"),
        ({"family": "arima"}, "family"),
        ({"schema_version": 2}, "schema_version"),
        ({"colour": "blue"}, "colour"),
        ({"files": {"config.json": {"bytes": -1, "sha256": "0" * 64}}}, "bytes"),
        ({"files": {"config.json": {"bytes": 1, "sha256": "0" * 63}}}, "sha256"),
        ({"files": {"config.json": {"bytes": 1, "sha256": "G" * 64}}}, "sha256"),
        ({"limits": {"min_context": 0, "max_context": 512, "max_horizon": 64}}, "min_context"),
        ({"origin": {"kind": "found", "source": "x"}}, "origin"),
        ({"created_at": None}, "created_at"),
    ],
)
def test_a_field_that_is_wrong_or_unknown_is_named(change: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        Manifest.model_validate(fields(**change))


def test_a_manifest_cannot_be_changed_in_place() -> None:
    manifest = Manifest.model_validate(fields())
    with pytest.raises(ValidationError, match="frozen"):
        manifest.version = "0123456789ab"


def test_an_evaluation_is_found_by_its_windows() -> None:
    manifest = Manifest.model_validate(fields(evaluations=[evaluation("test"), evaluation("unseen")]))
    assert manifest.evaluation("unseen") == Evaluation.model_validate(evaluation("unseen"))
    assert manifest.evaluation("train") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_a_number_has_no_canonical_form(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"skill": value})


def test_canonical_json_has_sorted_keys_and_no_spaces() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"d": None, "c": "é"}}) == b'{"a":{"c":"\\u00e9","d":null},"b":[1,2.5]}'
