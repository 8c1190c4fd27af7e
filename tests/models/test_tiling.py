"""Tiles cover an image, and blended they are the image, whatever its size."""

import itertools

import numpy as np
import pytest

from paddle_dit.models.tiling import blending_weights, cut, decode_tiles


def enlarge(latents, factor=2):
    return latents.repeat(factor, axis=2).repeat(factor, axis=3)


@pytest.mark.parametrize("largest", [8, 13, 128])
def test_pieces_are_few_equal_and_overlap_by_a_quarter_at_least(largest):
    for size in range(1, 5 * largest):
        pieces = cut(size, largest)
        lengths = {stop - start for start, stop in pieces}
        assert len(lengths) == 1
        assert max(lengths) <= largest
        assert (pieces[0][0], pieces[-1][1]) == (0, size)
        shared = [stop - start for (_, stop), (start, _) in itertools.pairwise(pieces)]
        assert all(amount >= largest // 4 for amount in shared)
        assert all(later[0] >= former[1] for former, later in zip(pieces, pieces[2:], strict=False))
        assert (len(pieces) == 1) == (size <= largest)
        fewer = len(pieces) - 1
        assert fewer < 1 or fewer * largest - (fewer - 1) * (largest // 4) < size


def test_weights_are_linear_where_two_pieces_overlap_and_one_in_all():
    first, second = blending_weights([(0, 4), (2, 6)], factor=2)
    np.testing.assert_allclose(first, [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(second, [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (7, 31), (33, 50), (29, 3)])
def test_tiles_of_what_depends_on_its_place_alone_are_the_whole(height, width):
    latents = np.random.default_rng(0).standard_normal((2, 3, height, width), dtype=np.float32)
    seen = []
    whole = decode_tiles(lambda tile: seen.append(tile.shape) or enlarge(tile), latents, 8, 2)
    assert (whole.dtype, whole.shape) == (np.float32, (2, 3, 2 * height, 2 * width))
    np.testing.assert_allclose(whole, enlarge(latents), atol=1e-6)
    assert {max(shape[2:]) <= 8 for shape in seen} == {True}


def test_what_fits_a_tile_is_decoded_whole_and_unchanged():
    latents = np.random.default_rng(0).standard_normal((2, 3, 8, 5), dtype=np.float32)
    seen = []
    np.testing.assert_array_equal(
        decode_tiles(lambda tile: seen.append(1) or enlarge(tile), latents, 8, 2), enlarge(latents)
    )
    assert seen == [1]


def test_tiles_that_disagree_leave_no_seam():
    brightness = iter(np.arange(100.0))
    whole = decode_tiles(
        lambda tile: np.full((1, 1, *(4 * size for size in tile.shape[2:])), next(brightness)),
        np.zeros((1, 1, 8, 30)),
        8,
        4,
    )
    steps = np.abs(np.diff(whole[0, 0, 0]))
    assert whole[0, 0, 0, -1] == 4
    assert steps.max() <= 1 / 8 + 1e-6  # neighbours differ by 1, and overlap by 8 pixels or more
