"""scripts/inspect_data.py as a process: what it says of a data set, and the picture."""

import json

import numpy as np
import pytest
from PIL import Image

from paddle_dit.data.inspection import Statistics
from paddle_dit.data.store import StoreWriter
from tests.digit_images import SIZE, VAE, write_digit_images

SCRIPT = "scripts/inspect_data.py"


def write_store(folder, scale=1.0, kind="latents", channels=4, vae=None, count=60):
    random = np.random.default_rng(0)
    labels = np.minimum(np.arange(count) // 3, 9) % 10
    options = {"num_classes": 12, "label_names": {0: "ant, emmet", 9: "yak", 11: "zebu"}, "vae": vae, "kind": kind}
    with StoreWriter(folder, sample_shape=(channels, 8, 8), shard_size=25, source="tests", **options) as writer:
        writer.append((scale * random.standard_normal((count, channels, 8, 8))).astype(np.float32), labels)
    return folder


def write_pairs(folder):
    for kind in ("features", "labels"):
        (folder / kind).mkdir(parents=True)
    for index in range(30):
        np.save(folder / "features" / f"{index}.npy", np.full((1, 4, 8, 8), index, np.float16))
        np.save(folder / "labels" / f"{index}.npy", np.array([index % 7]))
    return folder


def rows_of(result):
    assert result.returncode == 0, result.stderr
    return dict(line.split("  ", 1) for line in result.stdout.splitlines() if not line.startswith(" ") and "  " in line)


def test_a_store_is_told_in_full_and_without_paddle(run_command, tmp_path):
    store = write_store(tmp_path / "store", vae={"name": "a/vae", "scaling_factor": 0.5, "image_size": 64})
    code = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = run_command("-c", f"{code}; assert 'paddle' not in sys.modules", SCRIPT, store)
    rows = {name: value.strip() for name, value in rows_of(result).items()}
    size = sum(path.stat().st_size for path in store.glob("*.npy"))
    assert rows == {
        "data": f"packed store in {store}",
        "samples": "60 latents",
        "files": "3 shards of up to 25",
        "made from": "tests",
        "stored as": "float16 [4, 8, 8], of 64-pixel images",
        "size on disk": f"{size:,} bytes (0.00 GiB)",
        "VAE": "a/vae",
        "scaling factor": "0.5",
        "classes": "10 of 12 occur",
        "most often": "9 yak: 33, 0 ant: 3, 1: 3, 2: 3, 3: 3",
        "most rarely": "8: 3, 7: 3, 6: 3, 5: 3, 4: 3",
        "without samples": "10, 11 zebu",
    }
    assert "values of all 60 samples" in result.stdout
    assert "have a std of 0.9" in result.stdout or "have a std of 1.0" in result.stdout
    assert "0.5 is on record" in result.stdout
    assert "warning" not in result.stdout


def test_what_an_extraction_knows_is_told(run_command, tmp_path):
    images = write_digit_images(tmp_path / "digits", 40)
    for path in sorted(images.rglob("*.png"))[::6]:
        path.write_bytes(b"")
    flags = ["--data-path", images, "--features-path", tmp_path / "store", "--image-size", SIZE, "--vae", VAE]
    result = run_command("scripts/extract_features.py", *flags, "--on-error", "skip", "--seed", 7)
    assert result.returncode == 0, result.stderr
    rows = {name: value.strip() for name, value in rows_of(run_command(SCRIPT, tmp_path / "store")).items()}
    known = json.loads((tmp_path / "store" / "index.json").read_text())["extraction"]
    assert rows["made from"] == "images digits"
    assert rows["extraction"] == (
        "seed 7, batch size 32, shard size 8192, precision fp32, device cpu, threads 1, paths and labels "
        f"{known['images'][:16]}…"
    )
    broken = [str(path.relative_to(images)) for path in sorted(images.rglob("*.png"))[::6]]
    assert rows["skipped"] == f"7 that could not be read: {', '.join(broken[:5])}, …"
    assert rows["stored as"] == "float16 [4, 8, 8], of 32-pixel images"
    assert rows["VAE"] == f"{VAE}, weights {known['vae'][:16]}…"


def write_images(root):
    """Write nine images of three classes, one file that is none and one broken image."""
    for number in range(9):
        path = root / "abc"[min(number // 4, 2)] / f"{number}.{'jpg' if number == 8 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if number == 3 else "RGB", (20 + number, 30)).save(path)
    (root / "a" / "notes.txt").write_text("mine")
    (root / "b" / "broken.png").write_bytes(b"no picture")
    return root


def test_images_are_told_without_reading_their_pixels(run_here, tmp_path):
    root = write_images(tmp_path / "images")
    size = sum(path.stat().st_size for path in root.rglob("*.*g"))
    rows = {name: value.strip() for name, value in rows_of(run_here(SCRIPT, root)).items()}
    assert rows == {
        "data": f"images in {root}, a folder per class",
        "images": "10 (.png: 9, .jpg: 1), and 1 other files",
        "size on disk": f"{size:,} bytes (0.00 GiB)",
        "pixels": "20 to 28 wide, 30 to 30 high, of 9 images",
        "modes": "RGB: 8, L: 1",
        "broken": "1 cannot be opened: b/broken.png",
        "classes": "3 of 3 occur",
        "most often": "1 b: 5, 0 a: 4, 2 c: 1",
    }
    result = run_here(SCRIPT, root, "--decode", 3)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: {root} holds images; --decode shows latents, leave it out\n",
    )


def test_a_table_of_labels_and_a_single_class_are_told(run_here, tmp_path):
    root = write_images(tmp_path / "images")
    paths = [str(path.relative_to(root)) for path in root.rglob("*.*g")]
    (root / "labels.csv").write_text("\n".join(["file,label", *(f"{path},3" for path in paths)]))
    result = run_here(SCRIPT, root)
    rows = {name: value.strip() for name, value in rows_of(result).items()}
    assert rows["data"] == f"images in {root}, classes in labels.csv"
    assert (rows["classes"], rows["most often"], rows["without samples"]) == ("1 of 4 occur", "3 3: 10", "0, 1, 2")
    assert result.stdout.splitlines()[-1].startswith(f"{root} has one class only, '3'")


def test_of_many_images_some_are_opened_unless_all_are_asked_for(run_here, tmp_path):
    root = write_digit_images(tmp_path / "images", 450)
    broken = sorted(root.rglob("*.png"))[1]  # between those that are looked at
    broken.write_bytes(b"")
    rows = rows_of(run_here(SCRIPT, root))
    assert rows["pixels"].endswith("of 150 images, evenly spaced")
    assert "broken" not in rows
    rows = rows_of(run_here(SCRIPT, root, "--all"))
    assert rows["pixels"].endswith("of 449 images")
    assert rows["broken"].endswith(str(broken.relative_to(root)))


def test_pairs_are_told_and_what_they_do_not_say_is_left_open(run_here, tmp_path):
    rows = rows_of(run_here(SCRIPT, write_pairs(tmp_path / "pairs"), "--all"))
    assert rows["data"].strip().startswith("npy pairs")
    assert rows["stored as"].strip() == "float16 [4, 8, 8], of 64-pixel images"
    assert rows["VAE"].strip() == rows["scaling factor"].strip() == "not said"
    assert rows["classes"].strip() == "7 occur, in all 30 samples"
    assert rows["most often"].strip() == "0: 5, 1: 5, 2: 4, 3: 4, 4: 4"


@pytest.mark.parametrize(("scale", "warned"), [(5.5, True), (0.1, True), (1.2, False)])
def test_latents_that_were_not_scaled_are_warned_of(run_here, tmp_path, scale, warned):
    result = run_here(SCRIPT, write_store(tmp_path / "store", scale, vae={"scaling_factor": 0.18215}))
    assert ("warning: scaled latents should have a std near 1" in result.stdout) == warned
    assert f"a scaling factor of {0.18215 / scale:.2f}"[:-1] in result.stdout


def test_statistics_equal_numpys_whatever_the_blocks():
    samples = np.random.default_rng(0).normal(0.3, 2, (50, 6, 4, 4)).astype(np.float32)
    found = Statistics(6)
    for start in range(0, 50, 7):
        found.add(samples[start : start + 7], np.full(len(samples[start : start + 7]), start // 7))
    np.testing.assert_allclose(found.mean, samples.mean(axis=(0, 2, 3), dtype=np.float64))
    np.testing.assert_allclose(found.std, samples.std(axis=(0, 2, 3), dtype=np.float64))
    np.testing.assert_array_equal(found.least, samples.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(found.largest, samples.max(axis=(0, 2, 3)))
    assert found.std_of_all("latents") == pytest.approx(samples.std(dtype=np.float64))
    drawn = samples[:, :3].var(dtype=np.float64) + np.exp(samples[:, 3:].astype(np.float64)).mean()
    assert found.std_of_all("moments") == pytest.approx(np.sqrt(drawn))
    assert (found.count, found.labels.tolist()) == (50, [7] * 7 + [1])


@pytest.mark.parametrize("kind", ["latents", "moments"])
def test_some_latents_are_decoded_into_a_labelled_picture(run_here, tmp_path, kind):
    vae = {"name": "data/digits_vae", "scaling_factor": 0.9859727621078491, "image_size": 32}
    store = write_store(tmp_path / "store", kind=kind, channels=4 if kind == "latents" else 8, vae=vae)
    output = tmp_path / "pictures" / "some.png"
    result = run_here(SCRIPT, store, "--decode", 10, "--output", output)
    assert result.returncode == 0, result.stderr
    assert f"wrote {output}: 10 latents, evenly spaced, decoded" in result.stdout
    picture = np.asarray(Image.open(output))
    assert picture.shape == (2 * (64 + 4 + 18) + 4, 8 * (64 + 4) + 4, 3)
    assert picture.std() > 10


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--decode", "3"], "names no VAE; give one with --vae"),
        (["--decode", "3", "--vae", "nowhere"], "no such VAE folder: nowhere"),
        (["--decode", "-1"], "--decode must be 0 or more"),
        (["--decode", "1", "--output", "LICENSE/x.png"], "LICENSE is a file"),
    ],
)
def test_what_cannot_be_shown_is_one_line(run_here, tmp_path, flags, told):
    result = run_here(SCRIPT, write_store(tmp_path / "store"), *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_no_data_set_is_one_line(run_here, tmp_path):
    result = run_here(SCRIPT, tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path} is no data set")
    assert result.stderr.count("\n") == 1
