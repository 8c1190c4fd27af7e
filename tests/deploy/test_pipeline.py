import os
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from paddle_dit.deploy.export import build_pipeline
from paddle_dit.diffusion.options import SamplingOptions
from paddle_dit.errors import ConfigError
from paddle_dit.generation import draw_images

from ..conftest import ROOT
from .conftest import make_source

# Draws in a process where none of these can be imported.
WITHOUT = """
import sys
class Blocked:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("paddle", "paddlenlp", "ppdiffusers", "torch", "safetensors", "onnx"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked)
from paddle_dit.deploy import InferencePipeline
pipe = InferencePipeline.from_pretrained(sys.argv[1])
drawn = pipe(class_labels=["digit 3", 1], num_inference_steps=3, guidance_scale=2.0, seed=4)
drawn.images[0].save(sys.argv[2])
"""
BY_COMMAND = """
import runpy
sys.argv[1:] = ["--model", sys.argv[1], "--verify", "--class-labels", "1", "--output", sys.argv[2] + "s"]
runpy.run_path("scripts/infer.py", run_name="__main__")
"""
# Says by how many bytes the peak grew. In a process of its own, whose peak is not that of earlier tests.
CALLS = """
import sys
from paddle_dit.deploy import InferencePipeline
from paddle_dit.runtime import peak_rss
pipe = InferencePipeline.from_pretrained(sys.argv[1])
for seed in range(50):
    pipe([1, 2, 3], 4, 2.0, seed)
before = peak_rss()
for seed in range(500):
    pipe([seed % 10] * (1 + seed % 3), 2 + seed % 3, 1.0 + seed % 2, seed)
print(peak_rss() - before)
"""


def test_images_are_those_of_generation(source, pipeline):
    options = SamplingOptions("ddim", 5, 2.0, seed=4)
    wanted = draw_images(source, [3, 1, 4, 1, 5], options, batch_size=3, first_index=6)
    drawn = pipeline(["digit 3", 1, "4", 1, 5], 5, 2.0, 4, first_index=6)  # more than the engine takes at once
    assert [image.size for image in drawn.images] == [(32, 32)] * 5
    assert np.abs(drawn.pixels.astype(int) - wanted).max() <= 1
    np.testing.assert_array_equal(np.array(drawn.images[2]), drawn.pixels[2])
    alone = pipeline([1], 5, 2.0, 4, first_index=7)
    assert np.abs(alone.pixels.astype(int) - wanted[1]).max() <= 1


def test_the_sampler_is_chosen_at_run_time(pipeline):
    drawn = [
        pipeline([3], 4, **options).latents
        for options in ({}, {"sampler": "ddpm"}, {"sampler": "dpm-solver++"}, {"eta": 0.5}, {"guidance_channels": 4})
    ]
    assert all(np.abs(one - drawn[0]).max() > 1e-3 for one in drawn[1:])
    with pytest.raises(ConfigError, match="Did you mean 'ddim'"):
        pipeline([3], sampler="dim")
    with pytest.raises(ConfigError, match="no class is called"):
        pipeline(["cat"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"class_labels": "37"}, "class_labels must be a list"),
        ({"class_labels": []}, "class_labels must be a list"),
        ({"class_labels": 3}, "class_labels must be a list"),
        ({"class_labels": [3.7]}, "class_labels must be a list"),
        ({"class_labels": [None]}, "class_labels must be a list"),
        ({"precision": "fp16"}, "precision is the engine's, fp32"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"batch_size": 0}, "batch_size must be 1"),
        ({"first_index": -1}, "first_index must be 0"),
        ({"first_index": 2**63}, "first_index must be 0"),
        ({"first_index": 0.5}, "first_index must be an integer"),
    ],
)
def test_what_no_image_can_be_drawn_of_is_refused(pipeline, arguments, said):
    with pytest.raises(ConfigError, match=said):
        pipeline(**{"class_labels": [3], "num_inference_steps": 1, **arguments})


def test_labels_may_be_an_array(pipeline):
    np.testing.assert_array_equal(pipeline(np.array([3, 4]), 1).pixels, pipeline([3, "digit 4"], np.int64(1)).pixels)


def test_large_latents_are_decoded_in_tiles():
    source = make_source(sample_size=(144, 8), depth=1)
    wanted = draw_images(source, [1], SamplingOptions("ddim", 2, 1.0))
    drawn = build_pipeline(source, "dygraph")([1], 2, 1.0, sampler="ddim")
    np.testing.assert_allclose(drawn.pixels, wanted, atol=1)


@pytest.mark.parametrize("kind", ["onnxruntime", "paddle", "static"])
def test_eight_threads_draw_what_one_draws(source, pipeline, kind, tmp_path):
    pipe = pipeline if kind == "onnxruntime" else build_pipeline(source, kind, folder=tmp_path)
    calls = [([seed % 10] * (1 + seed % 3), 4, 2.0, seed) for seed in range(24)]
    serial = [pipe(*call).latents for call in calls]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda call: pipe(*call).latents, calls))
    for one, other in zip(serial, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_paddle_is_needed(exported, tmp_path, pipeline):
    command = [sys.executable, "-c", WITHOUT + BY_COMMAND, str(exported[0]), str(tmp_path / "image.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "comparisons within their limits" in done.stdout
    assert (tmp_path / "image.pngs" / "000000.png").is_file()
    wanted = pipeline(["digit 3", 1], 3, 2.0, 4).pixels[0]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "image.png")), wanted)


def test_a_package_that_the_command_lacks_is_one_line(exported):
    without = "import sys; sys.modules['tyro'] = None\nimport runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", without, "scripts/infer.py", "--model", str(exported[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: tyro is not installed here; pip install")


@pytest.mark.slow
def test_an_environment_of_three_packages_is_enough(exported, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "numpy", "pillow", "onnxruntime"]
    if subprocess.run(install, capture_output=True, check=False).returncode != 0:
        pytest.skip("no package index can be reached")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, "-c", WITHOUT, str(exported[0]), str(tmp_path / "image.png")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image.png").stat().st_size > 100


@pytest.mark.slow
def test_memory_does_not_grow_over_500_calls(exported):
    command = [sys.executable, "-c", CALLS, str(exported[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**24
