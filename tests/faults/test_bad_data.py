"""Data that a command cannot use: one line that says what and the way on, and nothing is lost."""

import json
import re
import shutil

import pytest

from paddle_dit.data.store import PackedStore
from paddle_dit.data.store_index import index_text
from paddle_dit.errors import DataError
from paddle_dit.extraction.job import Extraction
from paddle_dit.extraction.options import ExtractionOptions
from paddle_dit.meeting import StoppedError
from tests.digit_images import SIZE, VAE, write_digit_images
from tests.faults.runs import errors_in

EXTRACT, PACK, INSPECT, VERIFY, TRAIN = (
    *(f"scripts/{name}.py" for name in ("extract_features", "pack_features", "inspect_data", "verify_data")),
    "train.py",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write digits as PNG files, a folder for each class."""
    return write_digit_images(tmp_path_factory.mktemp("images") / "digits", 40, numbered=False)


def extract_here(images, folder, batches=1000, **values):
    """Extract in this process, or only so many batches of it; a shard has two."""
    asked = iter(range(batches))
    values = {"vae": VAE, "image_size": SIZE, "shard_size": 16, "batch_size": 8, "num_workers": 0, **values}
    options = ExtractionOptions(data_path=images, features_path=folder, **values)
    with Extraction(options, report=lambda line: None) as job:
        job.begin()
        job.run(stop=lambda: next(asked, None) is None)
    return folder


@pytest.fixture(scope="module")
def stores(images, tmp_path_factory):
    """Make two stores of the same images with other noise."""
    root = tmp_path_factory.mktemp("stores")
    return [extract_here(images, root / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def half(images, tmp_path):
    """Stop an extraction after two of its three shards."""
    with pytest.raises(StoppedError):
        extract_here(images, tmp_path / "half", batches=4)
    return tmp_path / "half"


def extraction_flags(images, folder):
    values = {"data-path": images, "features-path": folder, "image-size": SIZE, "vae": VAE}
    values |= {"shard-size": 16, "batch-size": 8, "num-workers": 1}
    return [EXTRACT, *(text for name, value in values.items() for text in (f"--{name}", value))]


def training_flags(*more):
    return [TRAIN, "--model", "DiT-Digits/2", "--global-batch-size", 8, "--max-steps", 1, *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_error(result):
    """Return the one line that the command ends with."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    errors = errors_in(result.stderr)
    assert len(errors) == 1, result.stderr
    return errors[0]


# Images


def nothing(images, root):
    root.mkdir()


def folders_without_images(images, root):
    shutil.copytree(images, root)
    for path in root.rglob("*.png"):
        path.unlink()


def no_classes(images, root):
    root.mkdir()
    for path in images.rglob("*.png"):
        shutil.copy(path, root)


def labelled(images, root):
    """Write all images into one folder with a ``labels.csv``, and return its lines."""
    no_classes(images, root)
    rows = [f"{path.name},{path.parent.name}" for path in sorted(images.rglob("*.png"))]
    (root / "labels.csv").write_text("\n".join(["file,label", *rows]))
    return rows


def labels_that_miss_images(images, root):
    rows = labelled(images, root)
    (root / "labels.csv").write_text("\n".join(["file,label", *rows[3:]]))


def labels_of_other_images(images, root):
    rows = labelled(images, root)
    (root / "labels.csv").write_text("\n".join(["file,label", *rows, "other.png,two"]))


def a_name_twice(images, root):
    rows = labelled(images, root)
    (root / "labels.csv").write_text("\n".join(["file,label", *rows, rows[0]]))


def images_twice_by_a_link(images, root):
    shutil.copytree(images, root)
    (root / "one" / "again").symlink_to(root / "one")


TREES = {
    nothing: "holds no images; give a folder that holds a folder of images per class",
    folders_without_images: "eight holds no images; add some or remove it",
    no_classes: "holds 40 images outside of class folders, the first is 0000.png; move them into one folder per class",
    labels_that_miss_images: "(3 such); mend the file; it needs the columns file,label and a line for every image",
    labels_of_other_images: "names other.png (1 such), which is no image there; mend the file",
    a_name_twice: "a second time; mend the file",
    images_twice_by_a_link: "twice, by a link; remove the link",
}


@pytest.mark.parametrize("command", [EXTRACT, TRAIN, INSPECT])
@pytest.mark.parametrize("make", TREES, ids=lambda make: make.__name__)
def test_images_that_cannot_be_used_are_one_line(run_here, images, tmp_path, make, command):
    root, output = tmp_path / "images", tmp_path / "output"
    make(images, root)
    flags = {
        EXTRACT: extraction_flags(root, output),
        TRAIN: training_flags("--data-path", root, "--vae", VAE, "--image-size", SIZE, "--output-dir", output),
        INSPECT: [INSPECT, root],
    }
    told = TREES[make]
    if command == INSPECT and make in (nothing, folders_without_images):
        told = "is no data set: expected index.json (packed store)"
    assert told in only_error(run_here(*flags[command]))
    assert not output.exists()


def test_one_class_is_extracted_and_trained_on_with_a_line(run_here, images, tmp_path):
    shutil.copytree(images / "one", tmp_path / "images" / "one")
    result = run_here(*extraction_flags(tmp_path / "images", tmp_path / "store"))
    assert result.returncode == 0, result.stderr
    told = f"{tmp_path / 'images'} has one class only, 'one': a model will learn no difference between classes"
    assert told in result.stdout.splitlines()
    flags = ["--feature-path", tmp_path / "store", "--output-dir", tmp_path / "run", "--global-batch-size", 2]
    result = run_here(*training_flags(*flags))
    assert result.returncode == 0, result.stderr
    assert "1 classes" in result.stdout


def test_images_of_which_none_can_be_read_make_no_store_and_mending_them_leads_on(run_here, images, tmp_path):
    root, folder = tmp_path / "images", tmp_path / "store"
    shutil.copytree(images, root)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    told = only_error(run_here(*extraction_flags(root, folder), "--on-error", "skip"))
    assert f"{folder}: all 40 samples were skipped; mend what they are made of, remove the folder, then" in told
    shutil.rmtree(folder)
    shutil.copytree(images, root, dirs_exist_ok=True)
    assert len(PackedStore(extract_here(root, folder))) == 40


# Stores


def of_another_version(half):
    plan = json.loads((half / "plan.json").read_text())
    del plan["sha256"]
    (half / "plan.json").write_bytes(index_text(plan | {"plan_version": 1}))


@pytest.mark.parametrize("damage", [lambda half: None, of_another_version], ids=["half", "other version"])
def test_a_store_half_written_is_named_by_whatever_reads_it(run_here, half, tmp_path, damage):
    damage(half)
    before, output = contents(half), tmp_path / "output"
    train = training_flags("--feature-path", half, "--output-dir", output)
    for command in ([INSPECT, half], [VERIFY, half], [PACK, half, output], [PACK, half, output, "--to", "npy"], train):
        told = only_error(run_here(*command))
        assert told.endswith(
            f"{half} holds a store half written: run the command that began it again, which continues, or remove the "
            "folder"
        )
    assert contents(half) == before
    assert not output.exists()


@pytest.mark.parametrize("command", [EXTRACT, PACK])
def test_a_store_half_written_by_another_version_is_left_alone(run_here, half, stores, images, tmp_path, command):
    of_another_version(half)
    before = contents(half)
    flags = extraction_flags(images, half) if command == EXTRACT else [PACK, stores[0], half, "--shard-size", 16]
    told = only_error(run_here(*flags))
    assert f"{half} was half written by another version of this program; finish it there, or remove the folder" in told
    assert contents(half) == before


def test_packing_into_a_folder_that_an_extraction_has_begun_is_refused_in_a_short_line(run_here, half, stores):
    before = contents(half)
    told = only_error(run_here(PACK, stores[0], half, "--shard-size", 16))
    assert "holds a store half written with other settings (" in told
    assert told.endswith("; run the former command, remove the folder or choose another")
    assert len(told) < 450 + len(str(half))
    assert contents(half) == before


def test_a_shard_of_another_run_in_a_store_half_written(half, stores, images, tmp_path):
    """With its sidecar it is named; alone it does not count, and is written again."""
    with pytest.raises(StoppedError):
        extract_here(images, tmp_path / "other", batches=4, seed=1)
    sidecar, former = half / "shard-00001.json", (half / "shard-00001.json").read_bytes()
    shutil.copy(tmp_path / "other" / sidecar.name, half)
    before = contents(half)
    with pytest.raises(
        DataError, match=rf"{sidecar} is of another run than .*plan\.json; remove it, and its shard is wri"
    ):
        extract_here(images, half)
    assert contents(half) == before
    for name, mend in ((sidecar.name, sidecar.unlink), ("latents-00001.npy", lambda: sidecar.write_bytes(former))):
        shutil.copy(tmp_path / "other" / name, half)
        mend()
        folder = shutil.copytree(half, tmp_path / f"mended-{name}")
        assert contents(extract_here(images, folder)) == contents(stores[0])


def test_a_shard_of_another_run_in_a_finished_store_is_named_by_whatever_reads_it(run_here, stores, tmp_path):
    mixed, output = tmp_path / "mixed", tmp_path / "output"
    shutil.copytree(stores[0], mixed)
    shutil.copy(stores[1] / "latents-00001.npy", mixed)
    train = training_flags("--feature-path", mixed, "--output-dir", output)
    told = f"{mixed / 'latents-00001.npy'} is not the file that index.json describes: of another run, or changed; copy"
    for command in ([INSPECT, mixed], [PACK, mixed, output], train):
        assert told in only_error(run_here(*command))
    result = run_here(VERIFY, mixed)
    assert "latents-00001.npy has changed: its sha256 is not that in index.json" in result.stdout
    assert f"{mixed} is damaged, 1 fault; copy or make the store again, or only the files named" in only_error(result)
    assert not output.exists()


def test_latents_that_the_patches_do_not_divide_are_refused(run_here, images, tmp_path):
    extract_here(images, tmp_path / "store", image_size=40)
    flags = ["--feature-path", tmp_path / "store", "--output-dir", tmp_path / "run", "--model", "DiT-S/4"]
    assert re.search(r"\b10\b.* patch", only_error(run_here(*training_flags(*flags))))
    assert not (tmp_path / "run").exists()
