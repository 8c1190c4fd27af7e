"""scripts/evaluate.py as a process: the table, metrics.json, VisualDL, statistics, and refusals in one line."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from paddle_dit.data.digits import enlarge, load_digits

from ..evaluation.inception_weights import formula_weights

SCRIPT = "scripts/evaluate.py"
DIGITS = ("--features", "digits")
RECORD = {
    "model": "runs/a/checkpoint-1200", "sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 1.5,
    "guidance_channels": 3, "guidance_interval": None, "seed": 4, "class_labels": [0, 1, 2],
}  # fmt: skip


@pytest.fixture
def samples(tmp_path):
    """Write the held-out digits as drawn pictures, with the grid and the record that scripts/sample.py leaves."""
    folder = tmp_path / "samples"
    folder.mkdir()
    pictures = np.round((enlarge(load_digits("heldout")[0], 32).transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:06d}.png")
    Image.fromarray(pictures[:4].reshape(128, 32, 3)).save(folder / "grid.png")
    (folder / "samples.json").write_text(json.dumps(RECORD))
    return folder


def rows_of(result):
    assert result.returncode == 0, result.stderr
    return {line[:18].strip(): line[18:].split() for line in result.stdout.splitlines() if line[17:18] == " "}


def test_every_figure_says_what_it_is(run_here, samples, tmp_path):
    stats, scalars = tmp_path / "real.npz", tmp_path / "scalars"
    result = run_here(SCRIPT, samples, "digits-train", *DIGITS, "--save-stats", stats, "--log-to", scalars)
    rows = rows_of(result)
    assert " ".join(rows["samples"]).startswith("samples, 300 images 32 x 32, sha256 ")
    drawn = "sampler ddim, num inference steps 50, guidance scale 1.5, guidance channels 3, seed 4"
    assert " ".join(rows["drawn with"]) == f"{drawn}, model runs/a/checkpoint-1200"
    assert " ".join(rows["reference"]).startswith("digits-train, 1,497 images 8 x 8, sha256 ")
    assert "a classifier of the embedded digits, weights " in " ".join(rows["features"])
    counts = "300 samples to 1,497 of the reference"
    assert " ".join(rows["FID-300"][1:]) == f"64 pool features, {counts}"
    assert " ".join(rows["sFID-300"][1:]) == f"112 spatial features, {counts}"
    assert "10 splits of 30" in " ".join(rows["Inception Score"])
    assert " ".join(rows["recall"][1:]) == "300 samples, 1,497 of the reference, k = 3, pool features"
    assert f"wrote {samples}/metrics.json, {stats}, {scalars}; " in result.stdout
    assert "warning" not in result.stdout
    written = json.loads((samples / "metrics.json").read_text())
    assert [f"{written['figures'][key]['value']:.2f}" for key in ("fid", "sfid")] == [
        rows["FID-300"][0],
        rows["sFID-300"][0],
    ]
    assert written["drawn_with"] == {key: value for key, value in RECORD.items() if key != "class_labels"}
    assert written["samples"]["count"] == 300
    assert len(written["reference"]["sha256"]) == len(written["features"]["weights"]) == 64
    assert_logged(scalars, 1200, {key: figure["value"] for key, figure in written["figures"].items()})

    again = rows_of(run_here(SCRIPT, samples, stats, *DIGITS))
    assert again["FID-300"][0] == rows["FID-300"][0]
    assert "precision" not in again
    assert (samples / "metrics-2.json").is_file()  # the earlier figures stay


def assert_logged(folder, step, values):
    from visualdl import LogReader

    (path,) = folder.glob("vdlrecords*")
    reader = LogReader(file_path=str(path))
    assert set(reader.get_tags()["scalar"]) == {f"evaluation/{key}" for key in values}
    for key, value in values.items():
        (point,) = reader.get_data("scalar", f"evaluation/{key}")
        assert (point.id, point.value) == (step, pytest.approx(value, rel=1e-6))


def test_real_digits_are_compared_without_any_file(run_command, tmp_path):
    result = run_command(SCRIPT, "digits-heldout", "digits-train", *DIGITS, "--output", tmp_path / "m.json")
    assert float(rows_of(result)["FID-300"][0]) < 3
    assert "not on record" in result.stdout


@pytest.mark.slow
def test_inception_runs_from_a_file_of_weights(run_command, tmp_path):
    random = np.random.default_rng(0)
    save_file(formula_weights(), tmp_path / "w.safetensors")
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", random.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    arguments = (tmp_path / "a.npz", tmp_path / "b.npz", "--inception", tmp_path / "w.safetensors")
    result = run_command(SCRIPT, *arguments)
    rows = rows_of(result)
    assert {"FID-6", "sFID-6", "Inception Score", "precision", "recall"} <= rows.keys()
    assert "with other weights than the public ones" in " ".join(rows["features"])
    assert "fewer than the 2,048 features" in result.stdout
    assert (tmp_path / "a.metrics.json").is_file()


@pytest.fixture
def odd(tmp_path):
    """Write files that cannot be evaluated."""
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "good.npz", images)
    np.savez(tmp_path / "small.npz", images[:, :16, :16])
    np.savez(tmp_path / "grey.npz", images[..., 0])
    np.savez(tmp_path / "float.npz", images / 255)
    np.savez(tmp_path / "named.npz", images=images)
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    np.savez(tmp_path / "others.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "samples.npz", images)
    (tmp_path / "samples.json").write_text('{"num_samples": 20}')
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-99])
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "good.npz"], "there is no "),
        (["good.npz", "nowhere"], "there is no "),
        (["empty", "good.npz"], "holds no images"),
        (["cut.npz", "good.npz"], "is damaged or no .npz"),
        (["float.npz", "good.npz"], "is float64; save uint8"),
        (["named.npz", "good.npz"], "has no array 'arr_0'"),
        (["grey.npz", "good.npz", "--features", "digits"], "digits are [8, 8]"),
        (["good.npz", "nan.npz", "--features", "digits"], "are NaN or infinite"),
        (["good.npz", "others.npz", "--features", "digits"], "statistics of 5 pool and 0 spatial features, not 64"),
        (["others.npz"], "others.npz holds statistics alone; give a REFERENCE"),
        (["good.npz", "good.npz", "--crop", "16"], "--crop is for folders, not for "),
        (["samples.npz", "good.npz"], "samples.npz is unfinished, of 20 images: 9 are there"),
        (["good.npz", "samples.npz"], "samples.npz is unfinished"),
        (["good.npz", "good.npz", "--inception", "absent.pth"], "no Inception weights at "),
        (["good.npz", "--features", "digits", "--inception", "good.npz"], "--inception is for --features inception"),
        (["digits-train", "good.npz"], "digits-train are 8 x 8 digits; add --features digits"),
        (["good.npz", "good.npz", "--batch-size", "0"], "--batch-size must be 1 or more"),
        (["good.npz", "good.npz", "--save-stats", "good.npz"], "good.npz is there already"),
        (["good.npz", "good.npz", "--save-stats", "x.txt"], "--save-stats must end in .npz"),
        (["good.npz", "good.npz", "--output", "there.json"], "there.json is there already"),
        (["good.npz", "good.npz", "--log-to", "there.json"], "there.json is a file"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_nothing_is_written(run_here, odd, arguments, told):
    before = sorted(odd.rglob("*"))
    paths = [odd / word if "." in word or word in ("nowhere", "empty") else word for word in arguments]
    result = run_here(SCRIPT, *paths)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if "OMP_NUM_THREADS" not in line and "WISELY" not in line]
    assert line.startswith("error: ")
    assert told in line
    assert sorted(odd.rglob("*")) == before


def test_cropping_a_folder_goes_with_a_file(run_here, samples, tmp_path):
    pictures = np.round((enlarge(load_digits("heldout")[0], 16).transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
    np.savez(tmp_path / "x.npz", pictures)
    rows = rows_of(run_here(SCRIPT, tmp_path / "x.npz", samples, *DIGITS, "--crop", "16"))
    assert "300 images 16 x 16" in " ".join(rows["reference"])
    assert float(rows["FID-300"][0]) < 3


def test_images_of_other_sizes_are_not_compared(odd):
    from paddle_dit.errors import DataError
    from paddle_dit.evaluation.inception_features import InceptionFeatures
    from paddle_dit.evaluation.suite import check, open_set

    features = InceptionFeatures.__new__(InceptionFeatures)  # its weights are not asked for
    good, small = open_set(odd / "good.npz"), open_set(odd / "small.npz")
    check(good, features, good)
    with pytest.raises(DataError, match=r"good.npz and small.npz have images of 32 x 32 and 16 x 16 pixels"):
        check(good, features, small)
