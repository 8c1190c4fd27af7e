"""From a folder of images per class to a DiTPipeline that draws such images, by the commands that a user has."""

import json

import pytest

from paddle_dit.data.digits import DIGIT_NAMES
from tests.digit_images import SIZE, VAE, write_digit_images

SETTINGS = {"--max-steps": 900, "--ema-decay": 0.98, "--image-logging-steps": -1, "--eval-steps": -1}  # for a short run


@pytest.fixture
def run(run_command):
    """Return a function that runs a command to its end and gives what it printed."""

    def run(*arguments, **options):
        result = run_command(*arguments, **options)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    return run


@pytest.mark.slow
@pytest.mark.distributed
def test_images_become_a_pipeline_that_draws_them(run, tmp_path):
    from paddle_dit.evaluation.quickstart import draw_and_judge
    from paddle_dit.models.vae import find_vae

    images, npy, packed, model, pipeline = (tmp_path / name for name in ("images", "npy", "packed", "run", "pipeline"))
    write_digit_images(images, 1497)
    names = {label: f"{label}-{name}" for label, name in DIGIT_NAMES.items()}
    (tmp_path / "names.json").write_text(json.dumps(names))
    scale = find_vae(VAE, fingerprint=False).scaling_factor
    two = {"processes": 2, "log_dir": tmp_path / "launch_log"}

    extraction = ["--image-size", SIZE, "--vae", VAE, "--format", "npy", "--shard-size", 256]
    told = run("scripts/extract_features.py", "--data-path", images, "--features-path", npy, *extraction, **two)
    assert "1,497 latents [4, 8, 8], float32; 10 classes, 144 to 153 each" in told
    assert (npy / "packed" / "preview.png").is_file()

    identity = ["--label-names", tmp_path / "names.json", "--vae", VAE, "--scaling-factor", scale]
    told = run("scripts/pack_features.py", npy, packed, "--num-classes", 10, *identity, "--verify")
    assert "verified: all 1,497 equal their source" in told
    told = run("scripts/inspect_data.py", packed, "--decode", 16, "--output", tmp_path / "data.png")
    assert "10 of 10 occur" in told
    assert (tmp_path / "data.png").is_file()

    settings = [str(word) for setting in SETTINGS.items() for word in setting]
    run("train.py", "-c", "configs/train-digits.yaml", "--eval-path", "None", *settings,
        "--feature-path", packed, "--output-dir", model, **two)  # fmt: skip
    run("scripts/convert_dit_to_ppdiffusers.py", "--checkpoint", model, "--vae", VAE, "--output", pipeline)
    sampling = ["--sampler", "ddim", "--num-inference-steps", 25, "--guidance-scale", 2, "--output", tmp_path / "drawn"]
    run("scripts/sample.py", "--model", pipeline, "--class-labels", "3-three", 8, *sampling)
    assert (tmp_path / "drawn" / "grid.png").is_file()
    assert draw_and_judge(pipeline, 200).generated_accuracy > 0.35  # by chance it would be 0.1
