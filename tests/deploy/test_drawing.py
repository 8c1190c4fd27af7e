"""scripts/export_inference.py and scripts/infer.py as processes."""

import json
import re

import pytest
from PIL import Image

from paddle_dit.runtime import has_gpu

from .conftest import sign


def infer(run_command, *arguments):
    return run_command("scripts/infer.py", *arguments)


def test_images_a_grid_and_their_record_are_written(exported, run_command, tmp_path):
    flags = ["--class-labels", "digit 2", 0, "--num-inference-steps", 2, "--seed", 3, "--sampler", "ddpm", "--verify"]
    result = infer(run_command, "--model", exported[0], "--output", tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr
    assert "40 comparisons within their limits" in result.stdout
    assert "for 2 steps" in result.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000000.png", "000001.png", "grid.png", "samples.json"]
    assert Image.open(tmp_path / "out" / "000001.png").size == (32, 32)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["class_labels"] == [2, 0]
    assert (record["sampler"], record["seed"], record["guidance_scale"]) == ("ddpm", 3, 4.0)
    assert (record["engine"], record["backend"]) == (str(exported[0]), "onnxruntime")
    assert len(record["weights_sha256"]) == 64
    assert {"onnxruntime", "numpy", "paddle_dit"} <= record["environment"].keys()


def test_an_engine_that_computes_something_else_ends_with_one_line(engine, run_command, tmp_path):
    (engine / "programs" / "decoder.onnx").write_bytes(b"no program")
    result = infer(run_command, "--model", engine, "--output", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "cut short or changed" in result.stderr
    sign(engine)
    result = infer(run_command, "--model", engine, "--output", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "cannot open" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [["--batch-size", 0], ["--threads", -1], ["--first-index", -1], ["--first-index", 2**63]]
)
def test_numbers_that_cannot_be_are_refused_by_their_flag(exported, run_command, tmp_path, flags):
    result = infer(run_command, "--model", exported[0], "--output", tmp_path / "out", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {flags[0]} must be ")
    assert not (tmp_path / "out").exists()


def test_another_version_than_the_engine_was_proven_with_is_told(engine, run_command, tmp_path):
    sign(engine, versions={"onnxruntime": "1.0"})
    flags = ["--class-labels", 1, "--num-inference-steps", 1, "--output", tmp_path / "out"]
    result = infer(run_command, "--model", engine, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the engine was proven with onnxruntime 1.0 (here ")


@pytest.mark.skipif(has_gpu(), reason="here the engine may have what it needs")
def test_a_fallback_is_told_and_the_record_names_what_ran(engine, run_command, tmp_path):
    sign(engine, backend="onnxruntime-tensorrt", device="gpu:0", precision="fp16", cuda_graph=True)
    flags = ["--class-labels", 1, "--num-inference-steps", 1, "--output", tmp_path / "out", "--fallback"]
    result = infer(run_command, "--model", engine, *flags)
    assert result.returncode == 0, result.stderr
    assert re.match("onnxruntime-tensorrt on gpu:0 cannot run here .*onnxruntime on the CPU", result.stdout)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (record["backend"], record["device"]) == ("onnxruntime", "cpu")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backend", "onnxruntime-tensorrt"], "TensorrtExecutionProvider"),
        (["--precision", "bf16"], "fp16"),
    ],
)
def test_an_export_that_cannot_be_is_refused_and_leaves_nothing(run_folder, run_command, tmp_path, flags, said):
    flags = ["--pipeline", run_folder, "--output", tmp_path / "deploy" / "engine", *flags]
    result = run_command("scripts/export_inference.py", *flags)
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
