"""scripts/extract_features.py as a process: what it says, what it leaves, and one line for what cannot be done."""

import numpy as np
import pytest

from paddle_dit.data.npy_pairs import NpyPairs
from paddle_dit.data.store import PackedStore
from paddle_dit.data.verify import open_check
from tests.digit_images import SIZE, write_digit_images

SCRIPT = "scripts/extract_features.py"
COUNT, BROKEN = 40, 20


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write digits as PNG files, a folder for each class; one is broken."""
    root = write_digit_images(tmp_path_factory.mktemp("images") / "digits", COUNT, numbered=False)
    sorted(root.rglob("*.png"))[BROKEN].write_text("no picture")
    return root


def flags(images, folder, *more):
    values = {"data-path": images, "features-path": folder, "image-size": SIZE, "vae": "data/digits_vae"}
    values |= {"shard-size": 16, "batch-size": 8, "num-workers": 1}
    return [SCRIPT, *(text for name, value in values.items() for text in (f"--{name}", value)), *more]


def test_images_become_a_store_after_a_broken_one_is_skipped(run_command, images, tmp_path):
    folder, broken = tmp_path / "store", sorted(images.rglob("*.png"))[BROKEN]
    refused = run_command(*flags(images, folder))
    assert refused.returncode == 2
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"cannot read the image {broken}: it is no image" in errors[0]
    result = run_command(*flags(images, folder, "--on-error", "skip"))
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert said[0] == "16 of 40 images are done already"
    assert said[1].startswith(f"skipped: cannot read the image {broken}")
    assert said[2].startswith("this process waited for images ")
    assert said[3:] == [
        said[3],
        said[4],
        f"skipped 1 images that cannot be read: {broken.relative_to(images)}",
        f"{folder} is whole; see {folder / 'preview.png'}",
    ]
    assert said[3].startswith("39 latents [4, 8, 8], float16; 10 classes, ")
    assert said[4].startswith("latents: mean of each channel ")
    assert "images/s" in result.stderr
    assert len(PackedStore(folder)) == 39
    assert not list(open_check(folder).problems())


@pytest.mark.slow
def test_npy_pairs_are_written_from_the_store(run_command, images, tmp_path):
    command = flags(images, tmp_path / "npy", "--format", "npy", "--on-error", "skip")
    result = run_command(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (
        f"{tmp_path / 'npy'} holds 39 npy pairs; {tmp_path / 'npy' / 'packed'} may be removed"
    )
    pairs, store = NpyPairs(tmp_path / "npy"), PackedStore(tmp_path / "npy" / "packed")
    for found, expected in zip(pairs.gather(np.arange(39)), store.gather(np.arange(39)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert store.index["dtype"] == "float32"
    assert not list(open_check(tmp_path / "npy").problems())


def test_help_teaches(run_command):
    result = run_command(SCRIPT, "--help")
    assert result.returncode == 0
    for taught in ("--nproc_per_node 8", "labels.csv", "--on-error", "continues what was stopped", "preview.png"):
        assert taught in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size", "36"], "image size 36 is not divisible by 8"),
        (["--vae", "nowhere"], "no such VAE folder: nowhere"),
        (["--data-path", "nowhere"], "there is no folder nowhere"),
        pytest.param(["--precision", "bf16"], "--precision bf16 needs a GPU", marks=pytest.mark.slow),
        (["--on-eror", "skip"], "unknown option '--on-eror'. Did you mean 'on-error'?"),
    ],
)
def test_what_cannot_be_done_is_one_line(run_command, images, tmp_path, more, message):
    result = run_command(*flags(images, tmp_path / "store", *more))
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "warn" not in line.lower()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "store").exists()
