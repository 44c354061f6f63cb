"""Weights learnt on the val part: they find what is best, stay near equal where nothing is, and never see the rest."""

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from candlecast import main
from model_store.manifest import TrainingRecord
from model_store.store import ModelStore
from models import scoring
from models.candles import DAY_MS
from models.ensemble import EnsembleForecaster, Member
from models.forecaster import Sampling
from tests.walk import WalkForecaster
from training.blend import blend, blended, learn
from training.candle_files import Series
from training.compare import compare
from training.evaluate import evaluate
from training.outcomes import Outcomes
from training.scores import KEPT, LEVELS, Scores
from training.windows import Split, rolling_origins

HORIZON = 30


def outcomes(windows: int, rng: np.random.Generator) -> Outcomes:
    """Independent windows, each a block of its own: log-returns N(0, h · 0.01²)."""
    steps = np.arange(1, HORIZON + 1)
    moves = np.cumsum(rng.normal(size=(windows, HORIZON)) * 0.01, axis=1)
    positions = HORIZON * np.arange(windows)
    times = DAY_MS * positions
    return Outcomes(
        part="val",
        interval="1d",
        horizon=HORIZON,
        symbols=np.array(["A"] * windows),
        origin_times=times,
        target_times=times[:, None] + DAY_MS * steps,
        positions=positions,
        grid=DAY_MS * np.arange(HORIZON * windows),
        last_close=np.full(windows, 100.0),
        actual=100 * np.exp(moves),
        walk_sigma=np.broadcast_to(0.01 * np.sqrt(steps), moves.shape),
        scale=np.broadcast_to(0.01 * np.sqrt(steps), moves.shape),
        one_step=np.ones(windows),
    )


def member(facts: Outcomes, shift: Any = 0.0, spread: float = 1.0) -> Scores:
    """The true distribution, its location moved by `shift` of its own width and its width by `spread`."""
    centre = np.broadcast_to(shift * facts.walk_sigma, facts.moves.shape)
    quantiles = np.moveaxis(scoring.walk_quantiles(spread * facts.walk_sigma, KEPT) + centre, 0, 1)
    crps = scoring.crps_quantiles(facts.moves, np.moveaxis(quantiles[:, 1:-1], 1, 0), LEVELS)
    return Scores(facts, "quantiles", None, 100 * np.exp(centre), quantiles, crps)


def test_weights_find_the_blend_whose_errors_cancel() -> None:
    facts = outcomes(400, np.random.default_rng(0))
    weights, blocks = learn([member(facts, 0.5), member(facts, -1.5)])
    assert blocks == (400, 400)
    for row in weights:
        assert row == pytest.approx((0.75, 0.25), abs=0.06)


def test_weights_differ_by_group_where_members_do() -> None:
    facts = outcomes(400, np.random.default_rng(1))
    late = np.arange(HORIZON) >= 8
    weights, _ = learn([member(facts, 2.0 * late), member(facts, 2.0 * ~late)])
    assert weights[0][0] > 0.9
    assert weights[1][1] > 0.9


def test_equal_members_share_equally() -> None:
    facts = outcomes(100, np.random.default_rng(2))
    one = member(facts, 0.3)
    weights, _ = learn([one, one, one])
    for row in weights:
        assert row == pytest.approx((1 / 3, 1 / 3, 1 / 3), abs=1e-3)


def test_members_that_differ_by_chance_alone_stay_near_equal() -> None:
    found = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        facts = outcomes(40, rng)
        noisy = [member(facts, 0.3 * rng.normal(size=(40, 1))) for _ in range(2)]
        found += [row[0] for row in learn(noisy)[0]]
    shares = np.array(found)
    assert abs(shares.mean() - 0.5) < 0.03
    assert shares.std() < 0.15


def test_fewer_windows_mean_weights_that_are_nearer_to_equal() -> None:
    rng = np.random.default_rng(4)
    facts = {count: outcomes(count, rng) for count in (3, 12, 400)}
    learnt = {count: learn([member(each), member(each, 0.0, 1.6)])[0][0][0] for count, each in facts.items()}
    assert learnt[3] == 0.5, "three blocks tell nothing"
    assert 0.5 < learnt[12] < learnt[400]


def test_three_members_are_shared_out_as_well() -> None:
    facts = outcomes(300, np.random.default_rng(5))
    weights, _ = learn([member(facts, 3.0), member(facts), member(facts)])
    for row in weights:
        assert row[0] < 0.1
        assert row[1] == pytest.approx(row[2], abs=0.01)


def test_scores_of_a_blend_are_those_of_its_forecasts(make_series: Callable[..., Series]) -> None:
    rng = np.random.default_rng(6)
    series = [make_series(name, 100 * np.exp(np.cumsum(rng.normal(size=900) * 0.01))) for name in "AB"]
    origins = rolling_origins(series, Split(12_300 * DAY_MS, 12_600 * DAY_MS, 20), "test", stride=20, min_context=64)
    members = [Member(WalkForecaster(spread=spread), 64, Sampling()) for spread in (0.5, 2.0)]
    weights = ((0.25, 0.75), (0.6, 0.4))
    alone = [EnsembleForecaster([each], ((1.0,), (1.0,)), 20) for each in members]
    expected = evaluate(EnsembleForecaster(members, weights, 20), series, origins, lookback=64)
    found = blended([evaluate(each, series, origins, lookback=64) for each in alone], weights)
    for name in ("point", "quantiles", "crps"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)


# -- from a folder to the store ------------------------------------------------------------------------


FIRST = date(2002, 1, 1)
SPLIT: dict[str, Any] = {
    "val_from": date(2004, 1, 1),
    "test_from": date(2005, 1, 1),
    "unseen": ["U"],
    "stride": 16,
    "horizon": 8,
}


def write_folder(folder: Path, *other: str) -> Path:
    """Daily random walks of A, B and unseen U over four years; those of `other` parts are other ones."""
    folder.mkdir()
    days = np.datetime64(FIRST) + np.arange(1461)
    part_of = np.where(days >= np.datetime64(SPLIT["test_from"]), "test", "train")
    part_of[(days >= np.datetime64(SPLIT["val_from"])) & (part_of == "train")] = "val"
    for seed, symbol in enumerate("ABU"):
        moves = np.random.default_rng(seed).normal(size=1461) * 0.01
        changed = np.full(1461, "unseen" in other) if symbol == "U" else np.isin(part_of, other)
        moves[changed] = np.random.default_rng(9 + seed).standard_t(3, size=int(changed.sum())) * 0.03
        closes = 100 * np.exp(np.cumsum(moves))
        lines = [
            f"{day},{c!r},{1.01 * c!r},{0.99 * c!r},{c!r},10" for day, c in zip(days, closes.tolist(), strict=True)
        ]
        (folder / f"{symbol}.csv").write_text("\n".join(["timestamp,open,high,low,close,volume", *lines]))
    return folder


@pytest.fixture
def members(store: ModelStore) -> list[str]:
    """A tiny Toto and the last close."""
    fields = {
        "model": "last-close",
        "family": "naive",
        "origin": {"kind": "trained", "source": "test"},
        "limits": {"min_context": 2, "max_context": 4096, "max_horizon": 512},
        "serving": {"lookback": 64},
        "created_at": "2025-01-01T00:00:00Z",
    }
    store.promote(f"last-close@{store.put(fields, {}, {}).version}")
    return ["toto-demo", "last-close"]


def test_weights_read_no_window_that_they_are_judged_by(
    tmp_path: Path, store: ModelStore, members: Sequence[str]
) -> None:
    plain = blend(store, members, write_folder(tmp_path / "plain"), name="ensemble", **SPLIT)
    assert plain.weights[0][0] not in (0.0, 0.5, 1.0), "or the rest would show nothing"
    found = blend(store, members, write_folder(tmp_path / "later", "test", "unseen"), name="other", **SPLIT)
    assert found.weights == plain.weights
    for before, after in zip(plain.manifest.evaluations, found.manifest.evaluations, strict=True):
        assert before.metrics["crps"].value != after.metrics["crps"].value
    val = blend(store, members, write_folder(tmp_path / "val", "val"), name="other", **SPLIT)
    assert val.weights != plain.weights


def test_an_ensemble_is_published_with_its_scores_and_serves_by_its_arithmetic(
    tmp_path: Path, store: ModelStore, members: Sequence[str]
) -> None:
    folder = write_folder(tmp_path / "candles")
    shown = CliRunner().invoke(
        main,
        [
            *("blend", *members, "--data", str(folder), "--store", str(store.root), "--unseen", "U", "--horizon", "8"),
            *("--val-from", "2004-01-01", "--test-from", "2005-01-01", "--stride", "16"),
        ],
    )
    assert shown.exit_code == 0, shown.output
    manifest = store.verify("ensemble")
    assert {each.windows for each in manifest.evaluations} == {"test", "unseen"}
    assert "crps_ratio_base" in manifest.evaluations[0].metrics
    for told in ("equal weights", "ewma", "last-close", "its best member there", "steps 1-8: "):
        assert told in shown.output
    assert manifest.canary
    assert manifest.baselines
    assert manifest.limits.max_horizon == 8
    store.promote("ensemble")  # the gate, with its canary
    [again] = compare(
        store, ["ensemble"], [], folder, parts=["test"], samples=8, **{k: v for k, v in SPLIT.items() if k != "horizon"}
    )
    published = manifest.evaluation("test")
    assert published
    assert again.evaluation.metrics["crps"].value == pytest.approx(published.metrics["crps"].value, rel=1e-9)


def test_what_was_seen_is_no_judge(tmp_path: Path, store: ModelStore, members: Sequence[str]) -> None:
    folder = write_folder(tmp_path / "candles")
    blend(store, members, folder, name="ensemble", **SPLIT)
    asked: dict[str, Any] = {"parts": ["test"], "samples": 8, **SPLIT}
    with pytest.raises(ValueError, match=r"weights of ensemble@.* were learnt on candles up to 2004-12"):
        compare(store, ["ensemble"], [], folder, **asked | {"parts": ["val"]})
    with pytest.raises(ValueError, match="judge it by later ones"):
        compare(store, ["ensemble"], [], folder, **asked | {"test_from": date(2004, 9, 1)})
    plain = store.load("toto-demo")
    record = TrainingRecord(
        recipe={}, data_digest="", symbols=("A",), interval="1d", start="2002-01-01", end="2004-06-01", steps=1,
        seconds=1, seed=0,
    )  # fmt: skip
    fields = plain.manifest.model_dump(exclude={"version", "files"}) | {"model": "late", "training": record}
    store.promote(f"late@{store.put(fields, plain.config, plain.weights).version}", force="test")
    with pytest.raises(ValueError, match=r"late@.* was trained on candles up to 2004-06-01"):
        blend(store, ["late", "last-close"], folder, name="other", **SPLIT)


def test_what_cannot_be_blended_is_said(tmp_path: Path, store: ModelStore, put_ensemble: Any) -> None:
    folder = write_folder(tmp_path / "candles")
    put_ensemble(store, ["toto-demo", "kronos-demo"], [[0.5, 0.5], [0.5, 0.5]])
    for names in (["toto-demo"], ["toto-demo", "toto-demo"]):
        with pytest.raises(ValueError, match="two different versions"):
            blend(store, names, folder, name="other", **SPLIT)
    with pytest.raises(ValueError, match="is an ensemble itself"):
        blend(store, ["toto-demo", "ensemble"], folder, name="other", **SPLIT)
