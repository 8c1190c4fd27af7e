"""One file as pixels: the paper's centre crop against arrays computed apart from it, and every kind of file."""

import zlib

import numpy as np
import pytest
from PIL import Image

from paddle_dit.data.images import centre_crop, check_image_size, read_image
from paddle_dit.errors import DataError


def random_pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def halve_axis(pixels):
    """Average along the first axis: output ``i`` is the mean of the pixels whose centres lie in its share of it."""
    old, new = len(pixels), len(pixels) // 2
    owners = [[j for j in range(old) if i * old < (j + 0.5) * new <= (i + 1) * old] for i in range(new)]
    means = np.stack([pixels[owner].astype(np.float64).mean(axis=0) for owner in owners])
    return np.floor(means + 0.5).astype(np.uint8)


def halve(pixels):
    return halve_axis(halve_axis(pixels.swapaxes(0, 1)).swapaxes(0, 1))


def reference(pixels, size):
    """The paper's rule: halve while both sides stay large enough, a cubic filter for the rest, the middle."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halve(pixels)
    height, width = pixels.shape[:2]
    short = min(height, width)
    new = (round(width * (size / short)), round(height * (size / short)))
    scaled = np.asarray(Image.fromarray(pixels).resize(new, Image.BICUBIC))
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return scaled[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width"),
    [(16, 16), (32, 32), (64, 128), (33, 33), (31, 31), (47, 90), (90, 47), (131, 67), (67, 131), (257, 255), (5, 9)],
)
def test_the_crop_equals_the_papers(height, width):
    pixels = random_pixels(height, width)
    cropped = centre_crop(Image.fromarray(pixels), 16)
    assert (cropped.dtype, cropped.shape) == (np.uint8, (16, 16, 3))
    np.testing.assert_array_equal(cropped, reference(pixels, 16))


def test_exact_multiples_are_plain_averages_and_the_size_itself_is_untouched():
    pixels = random_pixels(16, 19)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 16), pixels[:, 1:17])
    blocks = np.repeat(np.repeat(pixels[:, :16], 4, axis=0), 4, axis=1)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(blocks), 16), pixels[:, :16])


def test_an_image_too_thin_to_be_scaled_is_refused_before_it_takes_memory(tmp_path):
    Image.new("RGB", (60_000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"thin\.png: it is 60000 x 1 pixels, too thin"):
        read_image(tmp_path / "thin.png", 64)


@pytest.mark.parametrize("size", [0, -8, 4, 250])
def test_an_image_size_that_the_vae_cannot_halve_three_times_is_refused(size):
    check_image_size(256)
    with pytest.raises(DataError, match=rf"image size {size} is not divisible by 8.* choose"):
        check_image_size(size)
    with pytest.raises(DataError, match=r"choose 248, 256$"):
        check_image_size(250)


def test_a_file_is_read_as_the_crop_of_its_pixels_whatever_its_name_says(tmp_path):
    pixels = random_pixels(41, 29)
    for name, kind in (("a.png", "PNG"), ("b.JPEG", "PNG"), ("c.bmp", "BMP"), ("d.tif", "TIFF"), ("e.ppm", "PPM")):
        Image.fromarray(pixels).save(tmp_path / name, kind)
        np.testing.assert_array_equal(read_image(tmp_path / name, 16), reference(pixels, 16))


@pytest.mark.parametrize(("mode", "extension"), [("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")])
def test_other_modes_become_rgb_as_pillow_converts_them(tmp_path, mode, extension):
    path = tmp_path / f"image.{extension}"
    Image.fromarray(random_pixels(20, 16)).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(read_image(path, 16), reference(np.array(image.convert("RGB")), 16))


@pytest.mark.filterwarnings("ignore:Palette images")
def test_palettes_and_transparency_give_the_colours_below(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8], pixels[8:] = (200, 40, 0), (0, 90, 250)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "pt.png", transparency=0)
    palette.save(tmp_path / "ptt.png", transparency=bytes([128, 0]))
    Image.fromarray(np.dstack([pixels, np.full((16, 16), 3, np.uint8)])).save(tmp_path / "rgba.png")
    for name in ("p.png", "pt.png", "ptt.png", "rgba.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name, 16), pixels, err_msg=name)


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_16_bits_are_scaled_not_cut_off(tmp_path, name):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    values[3:9] += 150  # no multiples of 257 only
    if name.endswith("pgm"):  # as other programs write it: most significant byte first
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / name, 16), np.dstack([expected] * 3))


def test_pixels_without_an_agreed_range_are_refused(tmp_path):
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "floats.tif")
    Image.fromarray(np.full((16, 16), 70000, np.int32)).save(tmp_path / "wide.tif")
    for name, reason in (("floats.tif", "are floats"), ("wide.tif", "more than 16 bits")):
        with pytest.raises(DataError, match=f"{name}: its pixels .*{reason}.*; replace or remove it"):
            read_image(tmp_path / name, 16)


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotation_noted_in_the_file_is_applied(tmp_path, orientation, extension):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {  # from the EXIF standard: where the stored first row and column belong
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{extension}"
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(extension, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    np.testing.assert_allclose(read_image(path, 16), upright, atol=3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("notes", [b"no notes at all", b"MM\0", b"MM\0*\x0c", b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03"])
@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_broken_notes_in_a_file_do_not_cost_the_picture(tmp_path, extension, notes):
    path = tmp_path / f"image.{extension}"
    Image.new("RGB", (16, 16), (90, 90, 90)).save(path, exif=b"Exif\0\0" + notes)
    assert (read_image(path, 16) == 90).all()


def test_a_single_pixel_fills_the_image(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "1.png")
    assert (read_image(tmp_path / "1.png", 64) == (1, 2, 3)).all()


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def broken_files(folder):
    """Write files that are broken, each in another way, and return the reason expected for each."""
    whole = folder / "whole.jpg"
    Image.fromarray(random_pixels(64, 64)).save(whole)
    content = whole.read_bytes()
    Image.fromarray(random_pixels(64, 64)).save(folder / "whole.png")
    png = (folder / "whole.png").read_bytes()
    header = png_chunk(b"IHDR", (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    files = {
        "cut.jpg": (content[: len(content) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], ""),
        "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], ""),
        "empty.jpg": (b"", "it is no image"),
        "text.jpg": (b"<html>not found</html>", "it is no image"),
        "bomb.png": (bomb, "2500000000 pixels"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is no image"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: reason for name, (_, reason) in files.items()}


def test_a_broken_file_is_named_in_a_line_with_the_reason(tmp_path):
    reasons = {**broken_files(tmp_path), "absent.jpg": "No such file"}
    for name, reason in reasons.items():
        with pytest.raises(DataError) as error:
            read_image(tmp_path / name, 16)
        text = str(error.value)
        assert text.startswith(f"cannot read the image {tmp_path / name}: "), text
        assert reason in text
        assert text.endswith("; replace or remove it")
        assert "\n" not in text


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_files_cut_or_changed_anywhere_give_an_image_or_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # or a changed size takes seconds
    random = np.random.default_rng(0)
    path = tmp_path / "image"
    outcomes = set()
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF"):
        Image.fromarray(random_pixels(12, 12)).save(path, kind, exif=Image.Exif())
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            changed = content.copy()
            changed[random.integers(0, min(len(content), 200), 3)] = random.integers(0, 256, 3)
            path.write_bytes(changed[: random.integers(1, 2 * len(content))].tobytes())
            try:
                outcomes.add(read_image(path, 8).shape)
            except DataError:
                outcomes.add("refused")
    assert outcomes == {(8, 8, 3), "refused"}
