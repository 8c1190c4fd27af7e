"""A folder of many images: written in parts, found again, refused, mended."""

import json

import numpy as np
import pytest

from paddle_dit.errors import DataError
from paddle_dit.pictures import read_record
from paddle_dit.sampling.folder import NPZ, PARTS, SampleFolder

COUNT, SIZE = 7, 3
SETTINGS = {
    "model": "results",
    "vae": None,
    "seed": 0,
    "num_samples": COUNT,
    "batch_size": SIZE,
    "image_size": [8, 12],
    "output_format": "both",
    "environment": {"threads": "1", "paddle": "3.3.1"},
}
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 12, 3), dtype=np.uint8)


def sample_folder(folder, **settings):
    return SampleFolder(folder, {**SETTINGS, **settings}, np.arange(COUNT, dtype=np.int64))


def write_parts(work, numbers):
    for number in numbers:
        span = work.span(number)
        work.write_part(number, IMAGES[span.start : span.stop], [{"index": index} for index in span])


def make(folder, **settings):
    folder.mkdir(exist_ok=True)
    work = sample_folder(folder, **settings)
    work.begin()
    write_parts(work, range(work.num_parts))
    work.finish()
    work.clean()
    return work


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_are_batches_and_the_last_has_the_rest(tmp_path):
    work = sample_folder(tmp_path)
    assert [list(work.span(number)) for number in range(work.num_parts)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("output_format", ["both", "npz", "png"])
def test_a_finished_folder_holds_what_was_asked_for_and_nothing_else(tmp_path, output_format):
    work = make(tmp_path / "set", output_format=output_format)
    names = {"samples.json"} | ({NPZ} if output_format != "png" else set())
    names |= {f"{index:06d}.png" for index in range(COUNT)} if output_format != "npz" else set()
    assert set(contents(work.folder)) == names
    assert work.is_whole()
    if output_format != "png":
        with np.load(work.folder / NPZ, allow_pickle=False) as file:
            np.testing.assert_array_equal(file["arr_0"], IMAGES)
            np.testing.assert_array_equal(file["arr_1"], range(COUNT))
    if output_format != "npz":
        assert read_record(work.folder / "000004.png") == {"index": 4}


def test_order_and_repetition_of_parts_make_no_difference(tmp_path):
    make(tmp_path / "one")
    (tmp_path / "two").mkdir()
    first = sample_folder(tmp_path / "two")
    first.begin()
    write_parts(first, [2, 0, 0])
    second = sample_folder(tmp_path / "two")
    second.begin()
    assert second.finished() == {0, 2}
    write_parts(second, [1])
    second.finish()
    second.clean()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("damage", ["an image is cut", "an image is changed", "an image is gone", "the sidecar is cut"])
def test_a_damaged_part_is_not_finished(tmp_path, damage):
    work = sample_folder(tmp_path)
    work.begin()
    write_parts(work, range(3))
    image, sidecar = tmp_path / "000004.png", tmp_path / PARTS / "00001.json"
    if damage == "an image is gone":
        image.unlink()
    elif damage == "the sidecar is cut":
        sidecar.write_bytes(sidecar.read_bytes()[:-5])
    else:
        content = image.read_bytes()
        image.write_bytes(content[:-1] + (b"x" if damage == "an image is changed" else b""))
    assert work.finished() == {0, 2}


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
@pytest.mark.parametrize("name", ["000004.png", NPZ])
def test_a_complete_set_that_lost_something_is_mended(tmp_path, name, damage):
    work = make(tmp_path / "set")
    before = contents(work.folder)
    path = work.folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(before[name][:-1] + (b"x" if damage == "changed" else b""))
    again = sample_folder(work.folder)
    assert not again.is_whole()
    again.begin()
    missing = set(range(3)) - again.finished()
    assert missing == (set() if name == NPZ else {1})
    write_parts(again, missing)
    again.finish()
    again.clean()
    assert contents(work.folder) == before


def test_an_image_damaged_before_the_npz_is_made_is_told(tmp_path):
    work = sample_folder(tmp_path)
    work.begin()
    write_parts(work, range(3))
    (tmp_path / "000004.png").write_bytes((tmp_path / "000004.png").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"000004.png has been damaged .* run the same command again"):
        work.finish()
    assert not (tmp_path / NPZ).exists()


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"environment": {"threads": "1", "paddle": "9"}}, "paddle was '3.3.1', now '9'"),
        ({"guidance_scale": 1.5}, "guidance_scale was None, now 1.5"),
    ],
)
def test_samples_of_other_settings_are_refused_and_left_alone(tmp_path, change, told, complete):
    work = make(tmp_path / "set")
    if not complete:
        (work.folder / "samples.json").write_text(json.dumps(SETTINGS))
    before = contents(work.folder)
    other = sample_folder(work.folder, **change)
    with pytest.raises(DataError, match=f"holds samples of other settings .*{told}.*choose another --sample-dir"):
        other.is_whole() or other.begin()
    assert contents(work.folder) == before
    assert other.name != work.name


def test_settings_of_which_nothing_was_drawn_bind_no_one(tmp_path):
    sample_folder(tmp_path).begin()
    make(tmp_path, seed=1)
    assert read_record(tmp_path / "samples.json")["seed"] == 1


@pytest.mark.parametrize(("first", "then"), [("png", "both"), ("png", "npz"), ("both", "npz")])
def test_a_set_of_images_becomes_another_format_without_drawing(tmp_path, first, then):
    work, other = make(tmp_path / "set", output_format=first), make(tmp_path / "other", output_format=then)
    again = sample_folder(work.folder, output_format=then)
    if not again.is_whole():
        again.begin()
        assert again.finished() == {0, 1, 2}
        again.finish()
    again.clean()
    assert contents(work.folder).keys() == contents(other.folder).keys()
    assert (work.folder / NPZ).read_bytes() == (other.folder / NPZ).read_bytes()


def test_parts_are_taken_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / PARTS).mkdir()
    for number in (100_000, 99_999, 7):
        (tmp_path / PARTS / f"{number:05d}.json").touch()
    (tmp_path / PARTS / "notes.json").touch()
    assert [number for number, _ in sample_folder(tmp_path).sidecars()] == [7, 99_999, 100_000]


def test_a_sidecar_that_is_gone_at_the_end_is_told(tmp_path):
    work = sample_folder(tmp_path)
    work.begin()
    write_parts(work, range(3))
    (tmp_path / PARTS / "00001.json").write_text("{")
    with pytest.raises(DataError, match=r"damaged since it was written; run the same command again"):
        work.finish()


def test_weights_may_lie_elsewhere(tmp_path):
    work = make(tmp_path / "set")
    other = sample_folder(work.folder, model="elsewhere", vae="a/copy")
    assert other.is_whole()
    assert other.name == work.name


@pytest.mark.parametrize("left", ["000000.png", "samples.npz", "samples.json"])
def test_samples_that_nothing_is_known_of_are_refused(tmp_path, left):
    (tmp_path / left).write_text("no JSON")
    with pytest.raises(DataError, match=r"holds samples of which no samples\.json says how they were drawn"):
        sample_folder(tmp_path).begin()
    assert (tmp_path / left).read_text() == "no JSON"


def test_a_full_disk_is_noticed_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": COUNT * 8 * 12 * 3 - 1}))
    with pytest.raises(DataError, match=r"samples.npz will take 0 MiB, and 0 MiB are free there"):
        sample_folder(tmp_path).begin()
    sample_folder(tmp_path, output_format="png").begin()
