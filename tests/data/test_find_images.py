"""Finding images and their labels: torchvision's order, tables, and a line for whatever cannot be used."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from paddle_dit.data.images import find_images, read_image
from paddle_dit.errors import DataError


def write_image(path, colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), colour).save(path, "PNG")
    return path


def paths_of(folder):
    return [os.fsdecode(path) for path in folder.paths]


def found(root, **options):
    """Find images; anything worth reporting is a failure."""
    return find_images(root, report=pytest.fail, **options)


@pytest.fixture
def table(tmp_path):
    """Return a function that writes three images and a ``labels.csv`` of the lines given."""
    for name in ("a.png", "b.png", "more/c.png"):
        write_image(tmp_path / "pictures" / name)

    def write(*lines, encoding="utf-8"):
        (tmp_path / "pictures" / "labels.csv").write_bytes("\n".join(lines).encode(encoding))
        return tmp_path / "pictures"

    return write


# A folder per class


def test_classes_are_folders_sorted_as_text_and_images_are_in_torchvisions_order(tmp_path):
    for name in ("b/2.png", "b/10.JPEG", "b/s/z.webp", "b/s-t/y.Tif", "b/s/deep/x.ppm", "Z/1.bmp", "a/1.jpg"):
        write_image(tmp_path / name)
    folder = found(tmp_path)
    assert folder.class_folders == ["Z", "a", "b"]
    assert folder.label_names == {0: "Z", 1: "a", 2: "b"}
    # sorted(os.walk(...)) compares whole paths, and "-" comes before "/"
    below_b = ["b/10.JPEG", "b/2.png", "b/s/z.webp", "b/s-t/y.Tif", "b/s/deep/x.ppm"]
    assert paths_of(folder) == ["Z/1.bmp", "a/1.jpg", *below_b]
    assert (folder.labels.dtype, folder.labels.tolist()) == (np.int64, [0, 1, 2, 2, 2, 2, 2])
    assert (len(folder), folder.num_classes, folder.ignored) == (7, 3, 0)
    assert os.path.samefile(folder.file(3), tmp_path / "b/2.png")


def test_the_order_is_that_of_a_sorted_walk(tmp_path):
    """The rule of torchvision, word for word: sorted(os.walk(folder, followlinks=True)), then sorted file names."""
    for name in ("0", "1-", "1", "1/0", "1/-", "A", "a b", "ä"):
        for file in ("9.png", "10.png", "Ö.png"):
            write_image(tmp_path / "root/class" / name / file)
    write_image(tmp_path / "elsewhere/x/1.png")
    (tmp_path / "root/class/linked").symlink_to(tmp_path / "elsewhere")
    expected = []
    for place, _, names in sorted(os.walk(tmp_path / "root/class", followlinks=True)):
        expected += [os.path.relpath(os.path.join(place, name), tmp_path / "root") for name in sorted(names)]
    folder = find_images(tmp_path / "root", report=lambda line: None)
    assert paths_of(folder) == expected
    assert len(expected) == 25


def test_imagenet_folders_get_the_names_of_the_table_and_other_folders_keep_theirs(tmp_path):
    for name in ("n01484850", "n01440764", "n99999999", "dog"):
        write_image(tmp_path / name / "1.JPEG")
    names = found(tmp_path).label_names
    assert names[0] == "dog"
    assert names[1] == "tench, Tinca tinca"
    assert names[2].startswith("great white shark, white shark")
    assert names[3] == "n99999999"


def test_hidden_files_are_left_out_and_others_are_counted(tmp_path):
    for name in ("a/1.png", "a/.2.png", "a/.thumbs/3.png", "b/1.png", ".git/4.png"):
        write_image(tmp_path / name)
    for name in ("README", "a/notes.txt", "b/png", "b/x.jpg.part", "a/.DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "b/pipe.png")  # reading it would wait for ever
    folder = found(tmp_path)
    assert paths_of(folder) == ["a/1.png", "b/1.png"]
    assert folder.ignored == 5


def test_a_link_to_nowhere_is_noticed_when_it_is_read(tmp_path):
    write_image(tmp_path / "a/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.png").symlink_to(tmp_path / "gone.png")
    folder = found(tmp_path)
    assert paths_of(folder) == ["a/1.png", "b/1.png"]
    with pytest.raises(DataError, match=r"b/1\.png: No such file"):
        read_image(folder.file(1), 8)


def test_file_names_of_any_bytes_are_kept(tmp_path):
    write_image(tmp_path / "a" / os.fsdecode(b"caf\xe9.png"), colour=(7, 7, 7))
    write_image(tmp_path / "b" / "né.png")
    folder = found(tmp_path)
    assert folder.paths[0] == b"a/caf\xe9.png"
    assert (read_image(folder.file(0), 8) == 7).all()


def test_the_fingerprint_is_of_paths_and_labels(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        write_image(tmp_path / name)
    first = found(tmp_path).fingerprint
    assert first == hashlib.sha256(b"a/1.png\0b/2.png\0" + np.array([0, 1], "<i8").tobytes()).hexdigest()
    write_image(tmp_path / "a/1.png", colour=(0, 0, 0))
    assert found(tmp_path).fingerprint == first
    (tmp_path / "labels.csv").write_text("file,label\na/1.png,1\nb/2.png,0\n")
    assert found(tmp_path).fingerprint != first


def test_one_class_is_allowed_with_a_warning(tmp_path):
    write_image(tmp_path / "cats/1.png")
    lines = []
    assert find_images(tmp_path, report=lines.append).label_names == {0: "cats"}
    assert len(lines) == 1
    assert "one class only, 'cats'" in lines[0]


def test_one_folder_that_holds_the_classes_is_named(tmp_path):
    write_image(tmp_path / "images/cat/1.png")
    write_image(tmp_path / "images/dog/1.png")
    lines = []
    find_images(tmp_path, report=lines.append)
    assert lines[0].endswith(f"; if its folders are the classes, give {tmp_path / 'images'}")


@pytest.mark.parametrize("table", [False, True])
def test_classes_whose_names_differ_in_case_alone_are_reported(tmp_path, table):
    for name in ("Cat", "cat", "dog"):
        write_image(tmp_path / name / "1.png")
    if table:
        (tmp_path / "labels.csv").write_text("file,label\ncat/1.png,cat\nCat/1.png,Cat\ndog/1.png,dog\n")
    lines = []
    assert find_images(tmp_path, report=lines.append).label_names == {0: "Cat", 1: "cat", 2: "dog"}
    assert lines == [f"classes 'Cat' and 'cat' of {tmp_path} differ in case alone; make them one if they are one"]


@pytest.mark.parametrize("locked", ["a", "b/2.png"])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, locked):
    """Root may read everything, so it looks as nobody."""
    for name in ("a/1.png", "b/2.png"):
        write_image(tmp_path / name)
    (tmp_path / locked).chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above may be root's
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        with pytest.raises(DataError, match=rf"{locked}: Permission denied; .*remove it"):
            read_image(found(".").file(1), 8)
    finally:
        os.seteuid(user)


def test_folders_of_numbers_are_reported_only_where_they_are_not_their_ids(tmp_path):
    lines = []
    for number in range(10):
        write_image(tmp_path / str(number) / "1.png")
    find_images(tmp_path, report=lines.append)
    assert lines == []
    write_image(tmp_path / "10" / "1.png")
    find_images(tmp_path, report=lines.append)
    assert lines == ["classes are sorted as text, as in every DiT: folder '10' is class 2"]


def test_trees_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no images; give a folder"):
        find_images(tmp_path)
    write_image(tmp_path / "a/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.txt").write_text("x")
    with pytest.raises(DataError, match=r"class folder .*/b holds no images; add some or remove it"):
        find_images(tmp_path)
    write_image(tmp_path / "b/1.png")
    write_image(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"1 images outside of class folders, the first is stray\.png; .*labels\.csv"):
        find_images(tmp_path)


def test_the_folder_above_the_splits_is_refused_but_classes_may_have_their_names(tmp_path):
    write_image(tmp_path / "imagenet/train/n01440764/1.png")
    write_image(tmp_path / "imagenet/val/n01440764/1.png")
    with pytest.raises(DataError, match=r"holds train, val, which are no classes; give one of them"):
        find_images(tmp_path / "imagenet")
    for name in ("toys/train/1.png", "toys/ball/1.png", "states/train/1.png", "states/test/1.png"):
        write_image(tmp_path / name)
    assert found(tmp_path / "toys").class_folders == ["ball", "train"]
    assert found(tmp_path / "states").class_folders == ["test", "train"]


def test_a_link_in_a_circle_is_refused(tmp_path):
    write_image(tmp_path / "a/1.png")
    (tmp_path / "a/again").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="by a link; remove the link"):
        find_images(tmp_path)


# labels.csv


def test_names_in_labels_csv_get_ids_in_the_order_of_their_sorting(table):
    root = table("file,label", "more/c.png,dog", './a.png,"tench, Tinca"', "b.png, dog ")
    folder = found(root)
    assert paths_of(folder) == ["a.png", "b.png", "more/c.png"]
    assert folder.labels.tolist() == [1, 0, 0]
    assert folder.label_names == {0: "dog", 1: "tench, Tinca"}
    assert (folder.class_folders, folder.ignored) == ([], 0)


def test_integers_in_labels_csv_are_the_ids(table):
    folder = found(table("file,weight,label", "a.png,1,7", "b.png,1,10", "more/c.png,1,7"))
    assert folder.labels.tolist() == [7, 10, 7]
    assert folder.label_names == {7: "7", 10: "10"}
    assert folder.num_classes == 11


def test_labels_csv_may_come_from_a_spreadsheet_and_in_any_order(table):
    lines = ["b.png,1", "a.png,0", "more/c.png,2"]
    first = found(table("file,label", *lines))
    second = found(table("\ufefffile,label\r", *(f"{line}\r" for line in reversed(lines))))
    assert first.fingerprint == second.fingerprint
    assert first.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "does not begin with the line file,label"),
        (["a.png,0", "b.png,1", "more/c.png,0"], "does not begin with the line file,label"),
        (["file;label", "a.png;0"], "does not begin with the line file,label"),
        (["file,label", "a.png,0", "b.png,1", "a.png,0"], r"line 4 names a\.png a second time"),
        (["file,label", "a.png,0", "b.png,1", "./a.png,1"], r"line 4 names a\.png a second time"),
        (["file,label", "a.png,0", "b.png"], "line 3 is not a file and a label"),
        (["file,label", "a.png,0", "b.png, "], "line 3 is not a file and a label"),
        (["file,label", "a.png,0", ",1"], "line 3 is not a file and a label"),
        (["file,label", "a.png,tench, Tinca"], "line 2 is not a file and a label, quoted if it has commas"),
        (
            ["file,label", "a.png,0", "b.png,1", "more/c.png,1", "d.png,1"],
            r"names d\.png \(1 such\), which is no image",
        ),
        (["file,label", "a.png,0", "labels.csv,1"], r"names labels\.csv \(1 such\), which is no image"),
        (["file,label", "a.png,0"], r"misses b\.png \(2 such\)"),
        (["file,label", "a.png,0", "b.png,cat", "more/c.png,1"], r"labels b\.png 'cat'; give all images ids"),
        (["file,label", "a.png,0", "b.png,-1", "more/c.png,1"], r"labels b\.png '-1'; give all images ids"),
        (["file,label", "a.png,0.0", "b.png,1.0", "more/c.png,1.0"], r"labels a\.png '0\.0'; give all images ids"),
        (["file,label", "a.png,0", "b.png,1", "more/c.png,12345678901234567890"], "labels more/c.png '12345678"),
        (["file,label", 'a.png,"0'], "is no CSV file"),
    ],
)
def test_a_bad_labels_csv_is_explained_in_a_line(table, lines, message):
    with pytest.raises(DataError, match=message) as error:
        find_images(table(*lines))
    assert "\n" not in str(error.value)


def test_labels_csv_in_another_encoding_or_without_images(table, tmp_path):
    with pytest.raises(DataError, match=r"is no CSV file in UTF-8"):
        find_images(table("file,label", "a.png,né", encoding="latin-1"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/labels.csv").write_text("file,label\n")
    with pytest.raises(DataError, match="holds no images, only labels"):
        find_images(tmp_path / "bare")
