"""Randomness is an input: the same seed gives the same bits, here and on every other machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.candles import Floats
from models.uniforms import MAX_SEED, derive_seed, draw_uniforms

GOLDEN_UNIFORMS = ["0x1.be80697053d3fp-1", "0x1.2e744337e3990p-2", "0x1.2f785d5f65428p-2", "0x1.3dba4dd0ab928p-1"]
GOLDEN_STRATIFIED = ["0x1.be80697053d3fp-3", "0x1.905fe5a3eb0b0p-1", "0x1.b256888327f72p-2", "0x1.f17222e5a5933p-1"]
GOLDEN_SEED = 4_649_953_335_338_649_531
GOLDEN_EMPTY_SEED = 7_252_660_547_403_494_068


def test_uniforms_are_the_bits_they_have_always_been() -> None:
    # A numpy that changes these changes every stored seed's forecast: that is a release note, not a detail.
    drawn = draw_uniforms(7, 2, 2, 2)
    assert [value.hex() for value in drawn.ravel()[[0, 1, 6, 7]]] == GOLDEN_UNIFORMS
    stratified = draw_uniforms(7, 5, 2, 2, stratified=True)
    assert [value.hex() for value in stratified.ravel()[[0, 4, 9, 19]]] == GOLDEN_STRATIFIED


def test_a_derived_seed_is_the_number_it_has_always_been() -> None:
    assert derive_seed("BTC-USDT", "1h", 1_700_006_400_000, "0123456789ab") == GOLDEN_SEED
    assert derive_seed() == GOLDEN_EMPTY_SEED


def test_uniforms_have_the_asked_shape_and_range() -> None:
    drawn = draw_uniforms(1, 500, 30, 2)
    assert drawn.shape == (500, 30, 2)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1


@given(st.integers(0, MAX_SEED), st.integers(1, 40), st.integers(1, 40))
def test_more_independent_samples_extend_the_paths_without_changing_them(seed: int, few: int, more: int) -> None:
    prefix, longer = draw_uniforms(seed, few, 5, 2), draw_uniforms(seed, few + more, 5, 2)
    assert (longer[:few] == prefix).all()


def test_other_seeds_draw_other_uniforms() -> None:
    first = [draw_uniforms(seed, 1, 1, 1).item() for seed in range(1000)]
    assert len(set(first)) == 1000


def test_uniforms_are_uniform_within_and_between_seeds() -> None:
    within = draw_uniforms(3, 2000, 5, 2)
    between = np.array([draw_uniforms(derive_seed(n), 1, 1, 1).item() for n in range(4000)])
    for values in (within[..., 0].ravel(), within[..., 1].ravel(), between):
        counts, _ = np.histogram(values, bins=10, range=(0, 1))
        expected = len(values) / 10
        assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared of 9 degrees, p = 0.001
    assert abs(np.corrcoef(within[..., 0].ravel(), within[..., 1].ravel())[0, 1]) < 0.03


def test_the_largest_seed_draws_and_a_negative_one_does_not() -> None:
    assert draw_uniforms(MAX_SEED, 1, 1, 1).shape == (1, 1, 1)
    with pytest.raises(ValueError, match=r"key|positive|negative"):
        draw_uniforms(-1, 1, 1, 1)


@given(st.lists(st.text()))
def test_every_derived_seed_is_a_valid_seed(facts: list[str]) -> None:
    assert 0 <= derive_seed(*facts) <= MAX_SEED


def test_facts_do_not_run_into_each_other() -> None:
    assert len({derive_seed("ab", "c"), derive_seed("a", "bc"), derive_seed("abc"), derive_seed("ab", "c", "")}) == 4


# -- stratified ------------------------------------------------------------------------------------

SEEDS = range(400)


def stratified(seed: int, samples: int, steps: int = 30, draws: int = 2) -> Floats:
    return draw_uniforms(seed, samples, steps, draws, stratified=True)


@given(st.integers(0, MAX_SEED), st.integers(1, 20))
def test_every_stratum_of_every_draw_holds_one_path(seed: int, pairs: int) -> None:
    drawn = stratified(seed, 2 * pairs, 3)
    strata = np.sort(np.floor(drawn * 2 * pairs), axis=0)
    assert (strata == np.arange(2 * pairs)[:, None, None]).all()


@given(st.integers(0, MAX_SEED), st.integers(1, 40))
def test_paths_come_in_mirrored_pairs_and_an_odd_last_one(seed: int, samples: int) -> None:
    drawn = stratified(seed, samples, 3)
    assert drawn.shape == (samples, 3, 2)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    pairs = drawn[: samples // 2 * 2]
    np.testing.assert_allclose(pairs[0::2] + pairs[1::2], 1, rtol=1e-15)


def test_stratified_uniforms_are_a_function_of_the_seed() -> None:
    assert (stratified(5, 8) == stratified(5, 8)).all()
    assert (stratified(5, 8) != stratified(6, 8)).all()


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_each_stratified_path_alone_is_uniform(samples: int) -> None:
    drawn = np.array([stratified(seed, samples, 5) for seed in SEEDS])
    for path in range(samples):
        values = drawn[:, path].ravel()
        counts, _ = np.histogram(values, bins=10, range=(0, 1))
        expected = len(values) / 10
        assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared of 9 degrees, p = 0.001


def test_a_paths_strata_at_one_draw_say_nothing_of_those_at_another() -> None:
    drawn = np.array([stratified(seed, 8, 4) for seed in range(2000)]).reshape(2000, 8, 8)  # [seed, path, draw]
    for path in (0, 1, 7):
        correlation = np.corrcoef(drawn[:, path].T)
        assert np.abs(correlation - np.eye(8)).max() < 4.5 / np.sqrt(2000)


def test_the_mean_of_a_draw_is_far_more_certain_when_stratified() -> None:
    means = np.array([stratified(seed, 9)[:8].mean(axis=0) for seed in SEEDS])
    np.testing.assert_allclose(means, 0.5, atol=1e-12)  # mirrored pairs: exact for what is linear in the uniform
    squares = np.array([(stratified(seed, 8) ** 2).mean(axis=0) for seed in SEEDS])
    independent = np.array([(draw_uniforms(seed, 8, 30, 2) ** 2).mean(axis=0) for seed in SEEDS])
    assert squares.mean() == pytest.approx(1 / 3, abs=3e-4)
    assert squares.std() < 0.15 * independent.std()


@pytest.mark.parametrize("samples", [4, 7, 32])
def test_a_random_walk_of_stratified_draws_spreads_as_far_as_an_independent_one(samples: int) -> None:
    # Strata that are not dealt anew for every step add up: such paths spread several-fold.
    def ends(*, stratified: bool) -> Floats:
        uniforms = np.array([draw_uniforms(seed, samples, 30, 1, stratified=stratified) for seed in range(600)])
        return np.asarray(np.sqrt(12) * (uniforms[..., 0] - 0.5).sum(axis=2))  # [seed, path], variance 30

    for found in (ends(stratified=True), ends(stratified=False)):
        per_seed = (found**2).mean(axis=1)
        assert abs(per_seed.mean() - 30) < 4.5 * per_seed.std() / np.sqrt(len(per_seed))
    assert ends(stratified=True).mean(axis=1).std() < 0.6 * ends(stratified=False).mean(axis=1).std()
