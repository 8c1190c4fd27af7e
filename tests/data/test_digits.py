"""The embedded digits and their VAE are what their README says."""

import json
import os

os.environ.update(FLAGS_use_stride_kernel="0")

import numpy as np
import pytest

from paddle_dit.data import digits
from paddle_dit.errors import DataError


def rows_of(split):
    images, labels = digits.load_digits(split)
    return images, labels, {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize(("split", "count"), [("all", 1797), ("train", 1497), ("heldout", 300)])
def test_split_has_its_size_types_and_range(split, count):
    images, labels, _ = rows_of(split)
    assert images.shape == (count, 8, 8)
    assert images.dtype == np.uint8
    assert labels.shape == (count,)
    assert labels.dtype == np.int64
    assert images.min() == 0
    assert images.max() == 16
    assert set(labels.tolist()) == set(range(10)) == set(digits.DIGIT_NAMES)


def test_heldout_is_stratified_and_disjoint_from_train():
    _, labels, heldout = rows_of("heldout")
    assert np.bincount(labels).tolist() == [30] * 10
    with np.load(digits.DIGITS_FILE, allow_pickle=False) as stored:
        both = np.concatenate([stored["train_indices"], stored["heldout_indices"]])
    assert np.array_equal(np.sort(both), np.arange(1797))
    # No picture of one split turns up under another index in the other either.
    assert not heldout & rows_of("train")[2]


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    source = datasets.load_digits()
    images, labels = digits.load_digits("all")
    assert np.array_equal(images, source.images)
    assert np.array_equal(labels, source.target)


def test_callers_cannot_damage_the_stored_digits():
    digits.load_digits("all")[0][:] = 7
    assert digits.load_digits("all")[0].min() == 0


@pytest.mark.parametrize("size", [8, 32, 64, 256])
def test_shrink_undoes_enlarge(size):
    images, _ = digits.load_digits("heldout")
    images = images[:50] if size > 64 else images
    pictures = digits.enlarge(images, size)
    assert pictures.shape == (len(images), 3, size, size)
    assert pictures.dtype == np.float32
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    error = np.abs(digits.shrink(pictures) - images)
    # Measured at 32: mean 0.285, largest 1.82 of 16.
    assert error.mean() <= 0.35
    assert error.max() <= 2.5


def test_shrink_clips_what_a_decoder_overshoots():
    white = np.full((1, 3, 32, 32), 1.7, dtype=np.float32)
    assert digits.shrink(white).max() == 16
    assert digits.shrink(-white).min() == 0


def test_wrong_arguments_are_named():
    with pytest.raises(DataError, match="heldout"):
        digits.load_digits("held-out")
    with pytest.raises(DataError, match="multiple of 8"):
        digits.enlarge(np.zeros((1, 8, 8)), 30)
    with pytest.raises(DataError, match=r"\[N, 8, 8\]"):
        digits.enlarge(np.zeros((8, 8)), 32)
    with pytest.raises(DataError, match=r"\[N, 3, s, s\]"):
        digits.shrink(np.zeros((1, 32, 32)))


def test_missing_or_damaged_file_is_one_error(tmp_path, monkeypatch):
    digits._arrays.cache_clear()
    monkeypatch.setattr(digits, "DIGITS_FILE", tmp_path / "digits.npz")
    with pytest.raises(DataError, match="missing"):
        digits.load_digits()
    (tmp_path / "digits.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match="damaged"):
        digits.load_digits()
    digits._arrays.cache_clear()


def test_vae_folder_is_small_and_describes_itself():
    folder = digits.DIGITS_VAE_FOLDER
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2 * 2**20
    config = json.loads((folder / "config.json").read_text())
    assert (config["latent_channels"], config["sample_size"]) == (4, 32)
    assert (folder / "README.md").is_file()


@pytest.fixture(scope="module")
def vae():
    pytest.importorskip("paddle")
    ppdiffusers = pytest.importorskip("ppdiffusers")
    model = ppdiffusers.AutoencoderKL.from_pretrained(str(digits.DIGITS_VAE_FOLDER))
    model.eval()
    return model


def test_vae_rebuilds_digits_it_never_saw(vae):
    import paddle

    pictures = digits.enlarge(digits.load_digits("heldout")[0], 32)
    with paddle.no_grad():
        rebuilt = vae.decode(vae.encode(paddle.to_tensor(pictures)).latent_dist.mode()).sample.clip(-1, 1).numpy()
    # Measured: 3.2 of 255.
    assert np.abs(rebuilt - pictures).mean() * 127.5 <= 5


def test_vae_latents_have_unit_spread_in_every_channel(vae):
    import paddle

    pictures = digits.enlarge(digits.load_digits("train")[0], 32)
    paddle.seed(0)
    with paddle.no_grad():
        latents = vae.encode(paddle.to_tensor(pictures)).latent_dist.sample().numpy()
    assert latents.shape == (1497, 4, 8, 8)
    scaled = latents * vae.config.scaling_factor
    assert scaled.std() == pytest.approx(1, abs=0.05)
    assert scaled.std(axis=(0, 2, 3)) == pytest.approx(np.ones(4), abs=0.05)
    assert scaled.mean(axis=(0, 2, 3)) == pytest.approx(np.zeros(4), abs=0.05)
