"""The quickstart's whole path, short; .ci/run makes the full one."""

import json

import pytest
from PIL import Image

FIGURES = {
    "generated_accuracy", "real_heldout_accuracy", "num_samples", "nearest_distance_generated",
    "nearest_distance_heldout", "precision", "recall", "images_per_second", "seconds", "digit_features",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_every_stage_leaves_what_it_promises(run_command, tmp_path):
    output = tmp_path / "quickstart"
    result = run_command("scripts/quickstart.py", "--output", output, "--max-steps", "60", "--num-samples", "20")
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    assert report.keys() >= FIGURES
    assert set(report["seconds"]) == {"encode", "train", "convert", "pipeline", "judge", "total"}
    assert report["num_samples"] == 20
    assert report["real_heldout_accuracy"] > 0.97
    assert report["final_loss"] < 0.9
    assert report["digit_features"]["generated"].keys() == report["digit_features"]["real_heldout"].keys()
    assert report["digit_features"]["real_heldout"]["fid"] < 3 < report["digit_features"]["generated"]["fid"]
    for name in ("samples.png", "loss.png"):
        assert Image.open(output / name).size[0] > 300
    assert (output / "pipeline" / "model_index.json").is_file()
    assert (output / "run" / "checkpoint-60").is_dir()
    assert "Verdict" in result.stdout


@pytest.mark.slow
def test_a_failing_stage_ends_it_with_one_line(run_command, tmp_path):
    flags = ["--max-steps", "0", "--num-samples", "20", "--processes", "1"]
    result = run_command("scripts/quickstart.py", "--output", tmp_path / "quickstart", *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: training failed with exit code 2" in result.stderr
