"""Images as training samples: the crops that were asked for, mirrored or not, whoever decodes them."""

import dataclasses
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paddle_dit.data.image_source import ImageOptions
from paddle_dit.data.image_workers import Decoders
from paddle_dit.data.images import find_images, read_image
from paddle_dit.data.loader import BatchLoader
from paddle_dit.data.mixture import name_samples, open_sources
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.subset import hold_out
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.models.vae import VaeFiles
from paddle_dit.randomness import Stream, uniform
from tests.data.test_image_workers import children
from tests.digit_images import SIZE, write_digit_images

FOUR = VaeFiles("some/vae", latent_channels=4, factor=4, scaling_factor=0.5, fingerprint="f")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_digit_images(tmp_path_factory.mktemp("images"), 40)


@pytest.fixture
def options():
    """Return a function that makes options, whose processes are ended after the test."""
    made = []

    def options(num_workers=0, image_size=SIZE, vae=FOUR):
        made.append(Decoders(image_size, num_workers))
        return ImageOptions(image_size, vae, made[-1])

    yield options
    for decoders in made:
        decoders.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_is_the_crops_of_its_images_some_of_them_mirrored(images, options, num_workers):
    folder, source = find_images(images), options(num_workers, 16).open(images)
    indices, flipped = np.array([39, 0, 7, 7]), np.array([False, True, True, False])
    expected = np.stack([read_image(folder.file(index), 16) for index in indices])
    assert not np.array_equal(expected[2], expected[2, :, ::-1])
    pixels, labels = source.gather(indices)
    assert (pixels.dtype, pixels.shape, labels.dtype) == (np.uint8, (4, 16, 16, 3), np.int64)
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(labels, folder.labels[indices])
    expected[1:3] = expected[1:3, :, ::-1]
    np.testing.assert_array_equal(source.gather(indices, flipped)[0], expected)


def test_it_says_of_the_latents_what_a_store_says(images, options):
    source = options(image_size=64).open(images)
    assert (source.kind, len(source), source.sample_shape, source.has_flip) == ("images", 40, (4, 16, 16), True)
    assert source.vae == {"name": "some/vae", "scaling_factor": 0.5, "image_size": 64}
    assert (source.num_classes, source.label_names[3]) == (10, "3-three")
    assert source.fingerprint == find_images(images).fingerprint


def test_which_images_are_mirrored_depends_on_seed_step_and_position_alone(images, options):
    source, order = options().open(images), SampleOrder(40, 8, seed=3)
    mirrored = set()
    for ranks in (1, 2):
        for rank in range(ranks):
            with BatchLoader(source, order, rank=rank, world_size=ranks, start_step=4, seed=3) as loader:
                batch = next(loader)
            plain, _ = source.gather(order.local_batch(4, rank, ranks)[0])
            for pixels, image, position in zip(batch.latents, plain, batch.positions, strict=True):
                turned = bool(uniform(3, Stream.FLIPS, 4, np.arange(8))[position] < 0.5)
                np.testing.assert_array_equal(pixels, image[:, ::-1] if turned else image)
                mirrored.add(turned)
    assert mirrored == {True, False}


def test_all_threads_of_a_loader_are_served_and_each_has_a_process(images, options):
    before, source, order = children(), options(3).open(images), SampleOrder(40, 8, seed=0)
    assert children() == before
    for _ in range(3):
        source.gather(np.arange(4))
    assert len(children() - before) == 1
    with BatchLoader(source, order, num_workers=3) as loader, BatchLoader(source, order) as alone:
        for _ in range(20):
            for ours, theirs in zip(next(loader), next(alone), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert len(children() - before) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_an_error_that_names_it(tmp_path, options, num_workers):
    source = options(num_workers).open(write_digit_images(tmp_path / "images", 10))
    with open(source.name(4), "wb") as file:
        file.write(b"no image")
    with pytest.raises(DataError, match=f"cannot read the image {source.name(4)}: .*; replace or remove it"):
        source.gather(np.arange(10))
    assert len(source.gather(np.array([3, 5]))[0]) == 2


def test_a_killed_process_is_an_error_and_closing_leaves_none(images):
    before, decoders = children(), Decoders(SIZE, 1)
    source = ImageOptions(SIZE, FOUR, decoders).open(images)
    source.gather(np.arange(4))
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(DataError, match=r"decodes images was killed by signal 9 within .*\.png to .*\.png;"):
        source.gather(np.arange(4))
    decoders.close()
    decoders.close()
    assert children() == before


def test_closing_ends_those_who_read_and_those_who_wait(images, tmp_path):
    os.mkfifo(tmp_path / "stuck.png")  # whoever reads it waits for ever
    before = children()
    with Decoders(SIZE, 2) as decoders, ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(decoders.read, [tmp_path / "stuck.png"]) for _ in range(5)]
        while len(children() - before) < 2:
            threading.Event().wait(0.01)
        decoders.close()
        errors = [str(future.exception(timeout=5)) for future in asked]
    assert all("processes that decode images have been ended" in text or "signal 9" in text for text in errors)
    assert children() == before
    with pytest.raises(DataError, match="have been ended"):
        decoders.read([tmp_path / "stuck.png"])


def test_an_answer_that_nobody_took_is_not_taken_for_the_next_one(images, monkeypatch):
    folder, load = find_images(images), pickle.load

    def interrupted(file):
        raise KeyboardInterrupt

    with Decoders(SIZE, 1) as decoders:
        decoders.read([folder.file(0)])
        monkeypatch.setattr(pickle, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoders.read([folder.file(1)])
        monkeypatch.setattr(pickle, "load", load)
        with pytest.raises(DataError, match="killed by signal 9"):
            decoders.read([folder.file(2)])


@pytest.mark.parametrize(
    ("image_size", "patch_size", "fits"),
    [(36, 2, "32 or 40"), (4, 2, "8"), (0, 1, "4"), (33, 1, "32 or 36"), (48, 8, "32 or 64")],
)
def test_a_size_that_vae_and_patches_do_not_divide_is_refused(options, image_size, patch_size, fits):
    with pytest.raises(ConfigError, match=rf"--image-size {image_size} is not divisible by .*; choose {fits}$"):
        options(image_size=image_size).check_size(patch_size)
    options(image_size=64).check_size(patch_size)


def test_what_does_not_fit_a_model_is_refused_with_the_mend(images, options):
    with pytest.raises(DataError, match=r"has 10 classes, --num-classes says 7; use --num-classes 10"):
        options().open(images, num_classes=7)
    with pytest.raises(DataError, match=r"of 32-pixel images are \[4, 8, 8\] but .* 16\]; use --image-size 64"):
        options().open(images, sample_shape=(4, 16, 16))
    three = dataclasses.replace(FOUR, latent_channels=3)
    with pytest.raises(DataError, match=r"some/vae makes .* \[3, 8, 8\] but .* \[4, 8, 8\]; use another VAE"):
        options(vae=three).open(images, sample_shape=(4, 8, 8))
    (images / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"class folder .*empty holds no images"):
        options().open(images)
    (images / "empty").rmdir()


def test_classes_can_be_chosen_and_samples_held_out_and_named(images, options):
    chosen = open_sources([images], class_subset=["3-three", "8"], open_one=options(2).open)
    assert (chosen.num_classes, chosen.kind, set(chosen.labels)) == (2, "images", {0, 1})
    training, held_out = hold_out(chosen, 2)
    pixels, labels = held_out.gather(np.arange(2), np.array([True, False]))
    assert pixels.shape == (2, SIZE, SIZE, 3)
    for index, label, image, turned in zip(range(2), labels, pixels, (True, False), strict=True):
        name = name_samples(held_out, np.array([index]))
        assert ("/8-eight/" in name) == (label == 1)
        expected = read_image(name, SIZE)
        np.testing.assert_array_equal(image, expected[:, ::-1] if turned else expected)
    assert not set(training.indices) & set(held_out.indices)
