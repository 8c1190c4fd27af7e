"""Images are read in a stream, and whatever is wrong with them is said in a line."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from paddle_dit.errors import DataError
from paddle_dit.evaluation.images import ArrayImages, FolderImages, NpzImages, has_images
from paddle_dit.files import sha256

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 16, 24, 3), dtype=np.uint8)


def write_folder(folder, pixels=PIXELS):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


def write_npz(path, save=np.savez, **arrays):
    save(path, **(arrays or {"arr_0": PIXELS, "arr_1": np.arange(23)}))
    return path


def pixels_of(images, size):
    batches = list(images.batches(size))
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert len(batches) == -(-len(images) // size)
    return np.concatenate(batches)


@pytest.mark.parametrize("size", [1, 4, 23, 100])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_kind_gives_the_same_pixels_in_order(tmp_path, size, save):
    path = write_npz(tmp_path / "x.npz", save)
    folder = FolderImages(write_folder(tmp_path / "x"))
    for images in (NpzImages(path), folder, ArrayImages(PIXELS, "x")):
        assert (len(images), images.shape) == (23, (16, 24, 3))
        np.testing.assert_array_equal(pixels_of(images, size), PIXELS)
        assert list(images.warnings) == []
    assert NpzImages(path).sha256 == sha256(path)
    assert has_images(path)


def test_a_large_npz_is_not_taken_into_memory(run_command, tmp_path):
    zeros = np.zeros((1000, 256, 256, 3), np.uint8)  # 188 MiB, and next to nothing when compressed
    write_npz(tmp_path / "large.npz", np.savez_compressed, arr_0=zeros)
    code = """if True:
        import resource, sys
        from paddle_dit.evaluation.images import NpzImages
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        before, count = peak(), sum(map(len, NpzImages(__import__("pathlib").Path(sys.argv[1])).batches(32)))
        print(count, peak() - before)"""
    result = run_command("-c", code, tmp_path / "large.npz")
    count, growth = map(int, result.stdout.split())
    assert count == 1000
    assert growth < 60


def test_hidden_files_the_grid_and_other_files_are_left_out_and_folders_are_walked_through(tmp_path):
    write_folder(tmp_path / "b", PIXELS[:2])
    write_folder(tmp_path / "a" / "deep", PIXELS[2:5])
    write_folder(tmp_path / ".hidden")
    (tmp_path / "b" / "samples.json").write_text("{}")
    for name in ("grid.png", ".x.png"):
        Image.fromarray(PIXELS[0, :3]).save(tmp_path / "b" / name)
    images = FolderImages(tmp_path)
    np.testing.assert_array_equal(pixels_of(images, 3), PIXELS[[2, 3, 4, 0, 1]])
    assert len(images.warnings) == 1
    assert "lie in 2 folders" in images.warnings[0]


def test_lossy_files_are_told_of(tmp_path):
    write_folder(tmp_path / "x", PIXELS[:3])
    Image.fromarray(PIXELS[0]).save(tmp_path / "x" / "lossy.JPG")
    assert FolderImages(tmp_path / "x").warnings == ["1 of the images of x are compressed with loss, which FID notices"]


def test_cropping_takes_images_of_any_size_and_mode(tmp_path):
    folder = write_folder(tmp_path / "x", PIXELS[:2])
    Image.fromarray(PIXELS[2, ..., 0]).save(folder / "grey.png")
    Image.fromarray(np.full((40, 90, 3), 7, np.uint8)).save(folder / "wide.jpg")
    images = FolderImages(folder, crop=16)
    assert (len(images), images.shape) == (4, (16, 16, 3))
    found = pixels_of(images, 3)
    np.testing.assert_array_equal(found[0], PIXELS[0, :, 4:20])
    np.testing.assert_array_equal(found[2], PIXELS[2, :, 4:20, :1].repeat(3, axis=2))
    assert np.abs(found[3].astype(int) - 7).max() < 3


def grey(folder):
    Image.fromarray(PIXELS[0, ..., 0]).save(folder / "000007.png")


def palette(folder):
    Image.fromarray(PIXELS[0]).quantize(8).save(folder / "000007.png")


def smaller(folder):
    Image.fromarray(PIXELS[0, :8]).save(folder / "000007.png")


def text(folder):
    (folder / "000007.png").write_text("hello")


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (grey, "000007.png is grayscale, not RGB; save it as RGB"),
        (palette, "000007.png is of a palette, not RGB"),
        (smaller, "000007.png has 24 x 8 pixels, the first one 24 x 16; .* crop them with --crop SIZE"),
        (text, "cannot read the image .*000007.png: it is no image; replace or remove it"),
        (empty, "x holds no images; give a folder with PNG files, or an .npz with 'arr_0'"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_refused_before_it_is_read(tmp_path, damage, told):
    damage(write_folder(tmp_path / "x"))
    with pytest.raises(DataError, match=told):
        FolderImages(tmp_path / "x")


def test_a_file_that_is_cut_short_is_named_when_it_is_read(tmp_path):
    path = write_folder(tmp_path / "x") / "000019.png"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cannot read the image .*000019.png: .*; replace or remove it"):
        pixels_of(FolderImages(tmp_path / "x"), 5)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": PIXELS}, "has no array 'arr_0'; save the images as uint8"),
        ({"arr_0": PIXELS / 255}, r"is float64; save uint8: clip\(127.5 x"),
        ({"arr_0": np.array([None] * 3)}, "is object; save uint8"),
        ({"arr_0": PIXELS[:0]}, r"has shape \[0, 16, 24, 3\]"),
        ({"arr_0": np.uint8(3)}, r"has shape \[\]"),
        ({"arr_0": np.asfortranarray(PIXELS)}, "or columns first; save uint8"),
    ],
)
def test_an_npz_without_such_images_is_refused(tmp_path, arrays, told):
    with pytest.raises(DataError, match=told):
        NpzImages(write_npz(tmp_path / "x.npz", **arrays))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_refused_at_the_latest_when_it_is_read(tmp_path, save):
    whole = write_npz(tmp_path / "x.npz", save).read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    for content in (whole[:-50], whole[: len(whole) // 2], b"", b"PK\x03\x04", b"text" * 99, bytes(changed)):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"x.npz is damaged or no .npz"):
            pixels_of(NpzImages(tmp_path / "x.npz"), 10)


@pytest.mark.parametrize("count", [22, 24])
def test_a_header_of_another_number_of_images_is_seen(tmp_path, count):
    array = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *PIXELS.shape[1:])}
    np.lib.format.write_array_header_1_0(array, header)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("arr_0.npy", array.getvalue() + PIXELS.tobytes())
    with pytest.raises(DataError, match=r"images than its header says|bytes than its header says"):
        pixels_of(NpzImages(tmp_path / "x.npz"), 10)


@pytest.mark.parametrize("images", [PIXELS[:0], PIXELS.astype(np.float32)])
def test_arrays_of_other_things_are_refused(images):
    with pytest.raises(DataError, match="give one uint8 image or more"):
        ArrayImages(images, "x")
