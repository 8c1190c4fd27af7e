"""The fast-DiT layout: pairing by stem, order by number, and one line for whatever does not fit."""

import numpy as np
import pytest

from paddle_dit.data.npy_pairs import NpyPairs
from paddle_dit.errors import DataError

SHAPE = (4, 2, 2)


def write_pairs(folder, stems=range(12), name="imagenet256_", shape=(1, *SHAPE)):
    """Sample ``n`` holds the value ``n`` everywhere and has label ``n % 5``."""
    features, labels = folder / f"{name}features", folder / f"{name}labels"
    features.mkdir()
    labels.mkdir()
    for number, stem in enumerate(stems):
        np.save(features / f"{stem}.npy", np.full(shape, number, np.float32))
        np.save(labels / f"{stem}.npy", np.array([number % 5]))
    return features, labels


@pytest.mark.parametrize("name", ["imagenet256_", "", "my_own_"])
@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE)])
def test_pairs_are_read_in_the_order_of_their_numbers(tmp_path, name, shape):
    write_pairs(tmp_path, name=name, shape=shape)
    pairs = NpyPairs(tmp_path)
    indices = np.array([11, 2, 10, 0])  # as strings, 10 and 11 would come before 2
    latents, labels = pairs.gather(indices)
    assert (len(pairs), pairs.sample_shape) == (12, SHAPE)
    assert (latents.shape, latents.dtype, labels.dtype) == ((4, *SHAPE), np.float32, np.int64)
    np.testing.assert_array_equal(latents[:, 0, 0, 0], indices)
    np.testing.assert_array_equal(labels, indices % 5)


def test_stems_may_be_words_and_hidden_files_are_ignored(tmp_path):
    features, _ = write_pairs(tmp_path, stems=["ant", "bee", "cat"])
    (features / ".DS_Store").write_bytes(b"x")
    np.testing.assert_array_equal(NpyPairs(tmp_path).gather(np.arange(3))[0][:, 0, 0, 0], [0, 1, 2])


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
def test_any_float_type_and_memory_order_is_read(tmp_path, dtype):
    features, _ = write_pairs(tmp_path)
    latent = np.asfortranarray(np.arange(16).reshape(SHAPE)).astype(dtype)
    np.save(features / "3.npy", latent)
    np.testing.assert_array_equal(NpyPairs(tmp_path).gather(np.array([3]))[0][0], np.arange(16).reshape(SHAPE))


def test_a_folder_that_is_missing_or_holds_something_else(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        NpyPairs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found nothing"):
        NpyPairs(tmp_path)
    features, labels = write_pairs(tmp_path)
    with pytest.raises(DataError, match=f"give the folder above it, {tmp_path}"):
        NpyPairs(features)
    labels.rename(tmp_path / "classes")
    with pytest.raises(DataError, match="found classes, imagenet256_features"):
        NpyPairs(tmp_path)


@pytest.mark.parametrize("name", ["cat/1.png", "labels.csv", "1.JPEG"])
def test_a_folder_of_images_is_told_the_way(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"is no data set: .*; scripts/extract_features\.py makes latents of images$"):
        NpyPairs(tmp_path)


def test_two_data_sets_in_one_folder_are_refused(tmp_path):
    write_pairs(tmp_path)
    write_pairs(tmp_path, name="imagenet512_")
    with pytest.raises(DataError, match="imagenet256_features, imagenet512_features"):
        NpyPairs(tmp_path)


def test_empty_folders_are_refused(tmp_path):
    write_pairs(tmp_path, stems=[])
    with pytest.raises(DataError, match="is empty"):
        NpyPairs(tmp_path)


@pytest.mark.parametrize(("without", "lacks"), [("features", "features"), ("labels", "labels")])
def test_a_file_without_partner_is_named(tmp_path, without, lacks):
    write_pairs(tmp_path)
    for number in (2, 10):
        (tmp_path / f"imagenet256_{without}" / f"{number}.npy").unlink()
    with pytest.raises(DataError, match=rf"2 files have no partner.*2\.npy: imagenet256_{lacks} lacks it"):
        NpyPairs(tmp_path)


def test_misnamed_files_are_named(tmp_path):
    features, labels = write_pairs(tmp_path)
    for folder in (features, labels):
        (folder / "7.npy").rename(folder / "7 (copy).npy")
    with pytest.raises(DataError, match=r"7 \(copy\)\.npy is misnamed"):
        NpyPairs(tmp_path)
    (features / "8.npy").rename(features / "8.npz")
    with pytest.raises(DataError, match=r"8\.npz is not a \.npy file"):
        NpyPairs(tmp_path)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (np.zeros((1, 4, 2, 3), np.float32), r"\[1, 4, 2, 3\], expected floats of \[4, 2, 2\]"),
        (np.zeros((2, *SHAPE), np.float32), r"\[2, 4, 2, 2\], expected"),
        (np.zeros(SHAPE, np.int64), "is int64"),
        (np.full(SHAPE, np.nan, np.float32), r"3\.npy \(sample 3\) holds NaN"),
        (np.full(SHAPE, "x", object), "not a readable plain .npy"),
    ],
)
def test_a_feature_that_does_not_fit_is_named(tmp_path, feature, message):
    features, _ = write_pairs(tmp_path)
    np.save(features / "3.npy", feature, allow_pickle=True)
    pairs = NpyPairs(tmp_path)
    pairs.gather(np.array([2, 4]))
    with pytest.raises(DataError, match=r"features/3\.npy") as caught:
        pairs.gather(np.array([2, 3]))
    assert caught.match(message)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.array([5]), r"\(sample 3\) says class 5 of 5; raise --num-classes"),
        (np.array([-1]), r"\(sample 3\) says class -1"),
        (np.array([1, 2]), r"int64 \[2\], expected one integer"),
        (np.array([1.0]), "float64"),
        (np.array([None]), "not a readable plain .npy"),
    ],
)
def test_a_label_that_does_not_fit_is_named(tmp_path, label, message):
    _, labels = write_pairs(tmp_path)
    np.save(labels / "3.npy", label, allow_pickle=True)
    pairs = NpyPairs(tmp_path, num_classes=5)
    with pytest.raises(DataError, match=r"labels/3\.npy") as caught:
        pairs.gather(np.array([3]))
    assert caught.match(message)


@pytest.mark.parametrize("keep", [0, 5, 9, 60, 128, 191])
def test_a_file_cut_short_is_named(tmp_path, keep):
    features, _ = write_pairs(tmp_path)
    content = (features / "0.npy").read_bytes()
    assert len(content) == 192
    (features / "0.npy").write_bytes(content[:keep])
    with pytest.raises(DataError, match=r"features/0\.npy"):
        NpyPairs(tmp_path)


def test_a_file_that_vanishes_after_opening_is_named(tmp_path):
    features, _ = write_pairs(tmp_path)
    pairs = NpyPairs(tmp_path)
    (features / "6.npy").unlink()
    with pytest.raises(DataError, match=r"6\.npy is missing"):
        pairs.gather(np.array([6]))


@pytest.mark.parametrize("shape", [(256,), (1, 4, 0, 2), (2, 4, 2, 2)])
def test_a_first_file_that_is_no_latent_is_refused(tmp_path, shape):
    write_pairs(tmp_path, shape=shape)
    with pytest.raises(DataError, match=r"0\.npy is float32 \[.*\], expected floats of \[1,C,h,w\]"):
        NpyPairs(tmp_path)
