"""Augmented candles are candles, and say what they claim."""

import numpy as np
import pytest

from models.candles import CLOSE, check_candles
from training.augment import aggregate, mirror, mirrored_bars, scale_moves


@pytest.fixture
def windows(samples):
    chosen = [item for item in samples if len(item) > 500]
    return np.stack([item.candles[100:196] for item in chosen])


def moves(windows):
    return np.diff(np.log(windows[..., CLOSE]), axis=1)


def test_mirrored_windows_are_valid_and_move_the_other_way(windows):
    rows = np.arange(len(windows)) % 2 == 0
    mirrored = mirror(windows, rows)
    check_candles(mirrored.reshape(-1, 6))
    np.testing.assert_allclose(moves(mirrored)[rows], -moves(windows)[rows], atol=1e-12)
    np.testing.assert_array_equal(mirrored[~rows], windows[~rows])
    np.testing.assert_allclose(mirror(mirrored, rows), windows, rtol=1e-12)


def test_mirrored_bars_are_valid_and_move_the_other_way(windows):
    signs = np.where(np.random.default_rng(1).random(windows.shape[:2]) < 0.5, -1.0, 1.0)
    flipped = scale_moves(windows, signs)
    check_candles(flipped.reshape(-1, 6))
    np.testing.assert_allclose(moves(flipped), moves(windows) * signs[:, 1:], atol=1e-12)


def test_mirror_images_of_bars_start_where_the_bars_do(windows):
    images = mirrored_bars(windows)
    check_candles(images.reshape(-1, 6))
    before = np.log(windows[:, :-1, CLOSE])
    np.testing.assert_allclose(np.log(images[:, 1:, CLOSE]) - before, -moves(windows), atol=1e-12)
    one = np.ones(windows.shape[:2])
    one[:, 7] = -1
    np.testing.assert_allclose(images[:, 7], scale_moves(windows, one)[:, 7], rtol=1e-12)


def test_unit_factors_change_nothing(windows):
    np.testing.assert_allclose(scale_moves(windows, np.ones(windows.shape[:2])), windows, rtol=1e-12)


def test_aggregated_bars_equal_a_slow_loop(windows):
    merged = aggregate(windows, 3)
    check_candles(merged.reshape(-1, 6))
    for row, window in enumerate(windows):
        for bar in range(len(window) // 3):
            part = window[3 * bar : 3 * bar + 3]
            expected = [part[0, 0], part[:, 1].max(), part[:, 2].min(), part[-1, 3], part[:, 4].sum(), part[:, 5].sum()]
            np.testing.assert_allclose(merged[row, bar], expected)


def test_amounts_follow_the_new_prices(windows):
    for changed in (
        mirror(windows, np.ones(len(windows), dtype=bool)),
        scale_moves(windows, -np.ones(windows.shape[:2])),
    ):
        expected = changed[..., :4].mean(axis=-1) * changed[..., 4]
        np.testing.assert_allclose(changed[..., 5], expected)
