import numpy as np
import pytest
from PIL import Image

from paddle_dit.errors import ConfigError
from paddle_dit.pictures import hold_folder, labelled_grid, read_record, save_images, stacked, write_png


def halves(height, width):
    """Return one image whose upper half is red and whose lower half is blue."""
    image = np.zeros((1, height, width, 3), np.uint8)
    image[:, : height // 2, :, 0] = image[:, height // 2 :, :, 2] = 255
    return image


@pytest.mark.parametrize(("height", "width", "expected"), [(16, 32, 32), (32, 16, 128), (16, 16, 64)])
def test_a_grid_keeps_the_proportions(height, width, expected):
    grid = labelled_grid(np.repeat(halves(height, width), 3, axis=0), [""] * 3, columns=2, cell=64)
    gap = 4
    assert grid.size == (2 * 64 + 3 * gap, 2 * expected + 3 * gap)
    for left, top in ((gap, gap), (2 * gap + 64, gap), (gap, 2 * gap + expected)):
        assert grid.getpixel((left + 32, top + 2)) == (255, 0, 0)
        assert grid.getpixel((left + 32, top + expected - 3)) == (0, 0, 255)


def test_captions_stand_below_the_images():
    grid = np.asarray(labelled_grid(halves(16, 32), ["one"], columns=1, cell=64))
    line = grid[4 + 32 + 1 :]
    assert grid.shape == (32 + 18 + 8, 72, 3)
    assert (line.max(axis=2) > 150).any()


def test_pictures_stand_below_each_other_each_under_its_title():
    small, large = (labelled_grid(halves(16, 16), [""], columns=1, cell=cell) for cell in (48, 64))
    page = np.asarray(stacked({"one": small, "a title wider than its picture": large}))
    line = 26
    assert page.shape == (2 * line + small.height + large.height, large.width, 3)
    np.testing.assert_array_equal(page[line : line + small.height, : small.width], small)
    np.testing.assert_array_equal(page[2 * line + small.height :], large)
    for top in (0, line + small.height):
        assert (page[top : top + line].max(axis=2) > 150).any()
    assert (page[:, -6:].max(axis=2) < 40).all(axis=0).any(), "the long title keeps its margin"


def save(folder, count):
    images = np.repeat(halves(16, 32), count, axis=0)
    return save_images(folder, images, [""] * count, {"seed": 0}, [{"seed": 0, "index": i} for i in range(count)])


def test_small_images_are_enlarged_in_the_grid_alone(tmp_path):
    assert Image.open(save(tmp_path, 1)).size == (72, 40)
    assert Image.open(tmp_path / "000000.png").size == (32, 16)


def test_the_folder_is_new_each_time_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("samples", "samples-2", "samples-3"):
        with hold_folder(None, overwrite=False) as folder:
            assert folder.as_posix() == f"outputs/{name}"
            save(folder, 1)
    with hold_folder(None, overwrite=True) as folder:
        assert folder.as_posix() == "outputs/samples"
    with (
        pytest.raises(ConfigError, match=r"samples-2 holds an earlier set.*--overwrite"),
        hold_folder(tmp_path / "outputs" / "samples-2", overwrite=False),
    ):
        pass


def test_a_folder_that_another_process_is_about_to_fill_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hold_folder(None, overwrite=False) as first:
        with hold_folder(None, overwrite=False) as second:
            assert (first.name, second.name) == ("samples", "samples-2")
        for output, overwrite in ((first, False), (first, True), (None, True)):
            with pytest.raises(ConfigError, match="samples is in use by process"), hold_folder(output, overwrite):
                pass
        save(first, 1)
    assert sorted(path.name for path in first.iterdir()) == ["000000.png", "grid.png", "samples.json"]
    assert not second.exists(), "nothing was written into it"


def test_where_nothing_is_written_nothing_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), hold_folder(tmp_path / "a" / "b", overwrite=False):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with hold_folder(tmp_path, overwrite=False):
        pass
    assert tmp_path.exists(), "it was there before"


@pytest.mark.parametrize("left", ["000003.png", "samples.json", "grid.png", "samples.npz"])
def test_what_is_left_of_a_set_counts(tmp_path, left):
    (tmp_path / left).touch()
    with pytest.raises(ConfigError, match="earlier set"), hold_folder(tmp_path, overwrite=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_overwriting_removes_the_earlier_set_and_nothing_else(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "notes.png").touch()
    with hold_folder(tmp_path, overwrite=True) as folder:
        save(folder, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "grid.png", "notes.png", "samples.json"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"--output .*file is a file"),
        hold_folder(tmp_path / "file" / "samples", overwrite=False),
    ):
        pass


def test_every_file_of_a_set_says_how_it_was_drawn(tmp_path):
    save(tmp_path, 2)
    assert read_record(tmp_path / "samples.json") == read_record(tmp_path / "grid.png") == {"seed": 0}
    assert read_record(tmp_path / "000001.png") == {"seed": 0, "index": 1}


def test_a_record_does_not_change_the_pixels(tmp_path):
    write_png(tmp_path / "one.png", halves(16, 32)[0], {"name": "Zürich, 中文", "scale": 1.5})
    assert read_record(tmp_path / "one.png") == {"name": "Zürich, 中文", "scale": 1.5}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one.png")), halves(16, 32)[0])


@pytest.mark.parametrize("content", ["nothing", "another picture", "a text", "cut off", "no object"])
def test_a_file_without_a_record_is_refused(tmp_path, content):
    path = tmp_path / "one.png"
    if content == "another picture":
        Image.fromarray(halves(16, 32)[0]).save(path)
    elif content == "a text":
        path.write_text("no picture")
    elif content == "no object":
        write_png(path, halves(16, 32)[0], ["seed", 0])
    elif content == "cut off":
        write_png(path, halves(16, 32)[0], {"seed": 0})
        path.write_bytes(path.read_bytes()[:60])
    told = "no such file" if content == "nothing" else "does not say how it was drawn"
    with pytest.raises(ConfigError, match=told):
        read_record(path)
