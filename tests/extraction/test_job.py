"""Features of real images: what is stored is what the VAE says, whatever the batches, stops and broken files."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from paddle_dit.data.digits import DIGIT_NAMES, DIGITS_VAE_FOLDER
from paddle_dit.data.images import find_images, read_image
from paddle_dit.data.source import open_source
from paddle_dit.data.store import PackedStore
from paddle_dit.data.verify import open_check
from paddle_dit.errors import ConfigError, ConversionError, DataError
from paddle_dit.extraction.job import Extraction
from paddle_dit.extraction.options import ExtractionOptions
from paddle_dit.extraction.summary import PREVIEW, count_lines, figure_lines
from paddle_dit.meeting import StoppedError
from paddle_dit.models.vae import encode, load_vae
from paddle_dit.randomness import Stream, generator
from tests.digit_images import SIZE, write_digit_images

COUNT, SHAPE = 50, (4, 8, 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write digits as PNG files, a folder for each class."""
    return write_digit_images(tmp_path_factory.mktemp("images") / "digits", COUNT, numbered=False)


@pytest.fixture
def damaged(images, tmp_path):
    """Return a copy of the images, and the names of two in it that cannot be read."""
    root = tmp_path / "damaged" / "digits"
    shutil.copytree(images, root)
    paths = sorted(root.rglob("*.png"))[13::20]
    for path in paths:
        path.write_bytes(path.read_bytes()[:100])
    return root, [str(path.relative_to(root)) for path in paths]


def options(images, folder, **values):
    values = {"image_size": SIZE, "batch_size": 7, "shard_size": 20, "num_workers": 0, **values}
    return ExtractionOptions(
        data_path=images, features_path=folder, vae=values.pop("vae", str(DIGITS_VAE_FOLDER)), **values
    )


def extract(images, folder, stop=lambda: False, report=lambda line: None, advance=lambda amount: None, **values):
    with Extraction(options(images, folder, **values), report=report) as job:
        job.begin()
        return job.run(advance, stop)


def stop_after(batches):
    asked = iter(range(10_000))
    return lambda: next(asked) >= batches


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(folder, flipped=False):
    store = PackedStore(folder)
    return store.gather(np.arange(len(store)), np.full(len(store), True) if flipped else None)[0]


def pixels_of(images):
    found = find_images(images)
    pixels = np.stack([read_image(found.file(number), SIZE) for number in range(len(found))])
    return pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def noise_of(seed, mirrored=0):
    shape = {"size": SHAPE, "dtype": np.float32}
    return np.stack([generator(seed, Stream.ENCODING, mirrored, i).standard_normal(**shape) for i in range(COUNT)])


def test_latents_are_drawn_by_seed_and_image_and_scaled(images, tmp_path):
    done = []
    result = extract(images, tmp_path / "store", seed=3, dtype="float32", advance=done.append)
    expected = encode(load_vae(DIGITS_VAE_FOLDER), pixels_of(images), noise_of(3))
    np.testing.assert_allclose(everything(tmp_path / "store"), expected, atol=1e-4)
    assert sum(done) == COUNT
    store = open_source(tmp_path / "store")
    assert store.vae == {"name": str(DIGITS_VAE_FOLDER), "scaling_factor": 0.9859727621078491, "image_size": SIZE}
    assert (store.kind, store.index["scaled"], store.index["skipped"]) == ("latents", True, [])
    assert list(store.label_names.values()) == sorted(DIGIT_NAMES.values())
    np.testing.assert_array_equal(store.labels, find_images(images).labels)
    assert not list(open_check(tmp_path / "store").problems())
    kept = [path.name for path in (tmp_path / "store").iterdir() if path.suffix != ".npy"]
    assert sorted(kept) == ["index.json", "preview.png"]
    np.testing.assert_allclose(result.summary.mean, expected.mean(axis=(0, 2, 3)), atol=1e-3)


def test_moments_are_what_the_vae_says_and_latents_are_drawn_from_them(images, tmp_path):
    extract(images, tmp_path / "latents", dtype="float32")
    extract(images, tmp_path / "moments", store="moments")
    store = PackedStore(tmp_path / "moments")
    assert (store.kind, store.sample_shape, store.index["dtype"]) == ("moments", (8, 8, 8), "float32")
    assert store.index["scaled"] is False
    mean, log_variance = np.split(everything(tmp_path / "moments"), 2, axis=1)
    vae = load_vae(DIGITS_VAE_FOLDER)
    expected = encode(vae, pixels_of(images)) / vae.config.scaling_factor
    np.testing.assert_allclose(mean, expected, atol=1e-4)
    drawn = (mean + np.exp(log_variance / 2) * noise_of(0)) * vae.config.scaling_factor
    np.testing.assert_allclose(everything(tmp_path / "latents"), drawn, atol=1e-6)


def test_mirrored_images_are_encoded_too_with_noise_of_their_own(images, tmp_path):
    extract(images, tmp_path / "plain", dtype="float32")
    extract(images, tmp_path / "both", dtype="float32", flip=True)
    mirrored = encode(load_vae(DIGITS_VAE_FOLDER), pixels_of(images)[..., ::-1], noise_of(0, mirrored=1))
    np.testing.assert_allclose(everything(tmp_path / "both", flipped=True), mirrored, atol=1e-4)
    np.testing.assert_array_equal(everything(tmp_path / "both"), everything(tmp_path / "plain"))
    assert not list(open_check(tmp_path / "both").problems())


def test_the_noise_depends_on_nothing_but_seed_and_image(images, tmp_path):
    extract(images, tmp_path / "a", dtype="float32")
    extract(images, tmp_path / "b", dtype="float32", batch_size=32, shard_size=8192)
    extract(images, tmp_path / "c", dtype="float32", seed=1)
    first, other_batches, other_seed = (everything(tmp_path / name) for name in "abc")
    np.testing.assert_allclose(other_batches, first, atol=1e-5)
    assert np.abs(other_seed - first).max() > 1e-3


def test_the_same_command_gives_the_same_bytes_and_worker_processes_change_none(images, tmp_path):
    extract(images, tmp_path / "a")
    extract(images, tmp_path / "b", num_workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("batches", [0, 4, 7])
def test_a_stop_leaves_nothing_half_written_and_costs_the_present_shard(images, tmp_path, batches):
    extract(images, tmp_path / "whole")
    with pytest.raises(StoppedError):
        extract(images, tmp_path / "store", stop=stop_after(batches))
    left = set(contents(tmp_path / "store"))
    shards = batches // 3  # of three batches each; the last is short
    expected = {f"shard-{number:05d}.json" for number in range(shards)}
    assert left == {"plan.json", *expected, *(f"latents-{number:05d}.npy" for number in range(shards))}
    done = []
    with Extraction(options(images, tmp_path / "store")) as job:
        job.begin()
        assert job.done == 20 * shards
        job.run(done.append)
    assert sum(done) == COUNT - 20 * shards
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_written_again(images, tmp_path):
    extract(images, tmp_path / "whole")
    with pytest.raises(StoppedError):
        extract(images, tmp_path / "store", stop=stop_after(7))
    path = tmp_path / "store" / "latents-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with Extraction(options(images, tmp_path / "store")) as job:
        job.begin()
        assert (job.done, sorted((tmp_path / "store").glob("shard-*"))) == (
            20,
            [tmp_path / "store" / "shard-00000.json"],
        )
        job.run()
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_finished_store_is_known_again_and_its_picture_made_up_for(images, tmp_path):
    extract(images, tmp_path / "store")
    before = contents(tmp_path / "store")
    (tmp_path / "store" / PREVIEW).unlink()
    result = extract(images, tmp_path / "store", on_error="skip", num_workers=1)
    assert result.summary is None
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("kind", ["latents", "moments"])
def test_the_picture_shows_images_beside_what_their_latents_decode_to(damaged, tmp_path, kind):
    extract(damaged[0], tmp_path / "store", on_error="skip", store=kind)
    with Image.open(tmp_path / "store" / PREVIEW) as picture:
        page = np.asarray(picture.convert("L"), np.float64)
    assert page.shape == (4 * (96 + 12 + 18) + 12, 4 * (192 + 12) + 12)
    for row in range(4):
        for column in range(4):
            top, left = 12 + row * 126, 12 + column * 204
            image, decoded = page[top : top + 96, left : left + 96], page[top : top + 96, left + 96 : left + 192]
            assert np.corrcoef(image.ravel(), decoded.ravel())[0, 1] > 0.95


def test_a_broken_image_ends_all_with_its_name(damaged, tmp_path):
    root, names = damaged
    with pytest.raises(DataError, match=rf"cannot read the image .*{names[0]}: .*or leave .* --on-error skip"):
        extract(root, tmp_path / "store")


def test_broken_images_are_left_out_and_listed(images, damaged, tmp_path):
    (root, names), said = damaged, []
    result = extract(root, tmp_path / "store", on_error="skip", report=said.append, dtype="float32")
    assert [line.split(": ")[1] for line in said] == [f"cannot read the image {root / name}" for name in names]
    assert list(result.summary.skipped) == result.store.index["skipped"] == names
    assert not list(open_check(tmp_path / "store").problems())
    kept = np.delete(np.arange(COUNT), [13, 33])
    extract(images, tmp_path / "all", dtype="float32")
    np.testing.assert_allclose(everything(tmp_path / "store"), everything(tmp_path / "all")[kept], atol=1e-5)
    np.testing.assert_array_equal(result.store.labels, find_images(root).labels[kept])


def test_names_that_are_no_utf8_do_no_harm(images, tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    for place, path in enumerate(sorted(images.rglob("*.png"))[:4]):
        target = root / os.fsdecode(b"na\xefve") / os.fsdecode(b"\xff%d.png" % place)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if place else b"no picture")
    result = extract(root, tmp_path / "store", on_error="skip")
    assert result.store.index["skipped"] == [r"na\xefve/\xff0.png"]
    assert result.store.label_names == {0: r"na\xefve"}
    assert result.store.index["source"] == r"images caf\xe9"
    assert not list(open_check(tmp_path / "store").problems())


def test_after_a_broken_image_the_same_command_may_skip_it(damaged, tmp_path):
    extract(damaged[0], tmp_path / "whole", on_error="skip")
    with pytest.raises(DataError):
        extract(damaged[0], tmp_path / "store")
    extract(damaged[0], tmp_path / "store", on_error="skip")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"batch_size": 8}, "batch_size was 7, now 8"),
        ({"flip": True}, "has_flip was False, now True"),
        ({"store": "moments"}, "kind was 'latents', now 'moments'"),
    ],
)
def test_a_store_of_other_settings_is_refused(images, tmp_path, change, told):
    with pytest.raises(StoppedError):
        extract(images, tmp_path / "store", stop=stop_after(4))
    before = contents(tmp_path / "store")
    with pytest.raises(DataError, match=told):
        extract(images, tmp_path / "store", **change)
    assert contents(tmp_path / "store") == before
    extract(images, tmp_path / "store")
    with pytest.raises(DataError, match=r"already holds a store, of another .*; choose another folder"):
        extract(images, tmp_path / "store", **change)


def changed_vae(folder, **values):
    shutil.copytree(DIGITS_VAE_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return str(folder)


@pytest.mark.parametrize("kind", ["latents", "moments"])
@pytest.mark.parametrize(("factor", "warned"), [(1, False), (10, True), (0.1, True)])
def test_a_scaling_factor_far_from_what_the_latents_imply_is_warned_about(images, tmp_path, kind, factor, warned):
    vae = changed_vae(tmp_path / "vae", scaling_factor=0.98597 * factor)
    result = extract(images, tmp_path / "store", vae=vae, store=kind)
    lines = figure_lines(result.store, result.summary)
    assert any(line.startswith("warning: the VAE's scaling factor is") for line in lines) == warned
    assert any("mean of each channel" in line for line in lines)


def test_classes_without_a_sample_are_named(images, tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    rows = ["file,label"]
    for place, path in enumerate(sorted(images.rglob("*.png"))[:5]):
        shutil.copy(path, root / path.name)
        rows.append(f"{path.name},{3 * (place % 2)}")
    (root / "labels.csv").write_text("\n".join(rows))
    lines = count_lines(extract(root, tmp_path / "store").store)
    assert lines == ["5 latents [4, 8, 8], float16; 2 classes, 2 to 3 each", "warning: 2 classes have no sample: 1, 2"]


def test_numbers_that_float16_cannot_hold_name_the_image(images, tmp_path):
    vae = changed_vae(tmp_path / "vae", scaling_factor=1e6)
    with pytest.raises(DataError, match=r"of .*digits/eight/\d+.png, which float16 cannot hold; use --dtype float32"):
        extract(images, tmp_path / "store", vae=vae)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_size": 30}, DataError, "image size 30 is not divisible by 8"),
        ({"batch_size": 0}, ConfigError, "--batch-size must be 1 or more, got 0"),
        ({"shard_size": -1}, ConfigError, "--shard-size must be 1 or more, got -1"),
        ({"num_workers": -1}, ConfigError, "--num-workers must be 0 or more, got -1"),
        ({"seed": 2**56}, ConfigError, "--seed must be between 0 and"),
        ({"precision": "fp16"}, ConfigError, "--precision fp16 needs a GPU"),
        ({"format": "npy", "flip": True}, ConfigError, "npy pairs hold .*use --format packed with --flip"),
        ({"format": "npy", "store": "moments"}, ConfigError, "use --format packed with --store moments"),
        ({"vae": "nowhere"}, ConversionError, "no such VAE folder: nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(images, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        extract(images, tmp_path / "store", **change)
    assert not (tmp_path / "store").exists()


def test_the_vae_decides_by_how_much_images_shrink(images, tmp_path):
    from ppdiffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
    vae = AutoencoderKL(block_out_channels=[4] * 5, norm_num_groups=2, latent_channels=3, **blocks)
    vae.save_pretrained(str(tmp_path / "vae"))
    with pytest.raises(ConfigError, match=r"--image-size 24 is not divisible by 16, .*; choose 16 or 32"):
        extract(images, tmp_path / "store", vae=str(tmp_path / "vae"), image_size=24)
    told = []
    store = extract(images, tmp_path / "store", report=told.append, vae=str(tmp_path / "vae")).store
    assert (store.sample_shape, told) == ((3, 2, 2), [])
    extract(images, tmp_path / "odd", report=told.append, vae=str(tmp_path / "vae"), image_size=48)
    assert "latents will be 3 x 3, which no preset" in told[0]
    assert "images of 32 or 64 pixels would do" in told[0]


def test_a_result_among_the_images_is_refused(images):
    with pytest.raises(ConfigError, match="lies in --data-path; choose a folder beside it"):
        extract(images, images / "features")


def test_a_second_extraction_into_the_same_folder_is_refused(images, tmp_path):
    with Extraction(options(images, tmp_path / "store")) as first:
        first.begin()
        with pytest.raises(ConfigError, match="is in use by process"):
            extract(images, tmp_path / "store")
        first.run()
    assert not list(open_check(tmp_path / "store").problems())
