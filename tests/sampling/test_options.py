"""Command lines of the sampling scripts: the flags of the paper's code, others' recipes, and what contradicts."""

from pathlib import Path

import pytest

from paddle_dit.cli import parse
from paddle_dit.config import DiTConfig
from paddle_dit.errors import ConfigError
from paddle_dit.sampling.options import SWITCHES, ManyOptions, SampleOptions

from ..conftest import ROOT


def sample(*argv):
    return parse(SampleOptions, argv, description="", switches=SWITCHES)


def many(*argv):
    return parse(ManyOptions, argv, description="", switches=SWITCHES)


def test_the_papers_command_line_is_understood():
    line = "--model DiT-XL/2 --vae ema --image-size 512 --num-classes 1000 --cfg-scale 1.5 --num-sampling-steps 100"
    options = sample(*line.split(), "--seed", "7", "--ckpt", "weights")
    assert (options.path, options.vae_name) == (Path("weights"), "stabilityai/sd-vae-ft-ema")
    assert (options.guidance_scale, options.num_inference_steps, options.seed) == (1.5, 100, 7)
    options.check_model(DiTConfig.from_preset("DiT-XL/2", sample_size=64), factor=8)


def test_the_papers_command_line_for_many_images_is_understood():
    line = "--model DiT-XL/2 --vae mse --sample-dir out --per-proc-batch-size 8 --num-fid-samples 100 --global-seed 3"
    options = many(*line.split(), "--ckpt", "weights")
    assert (options.sample_dir, options.per_proc_batch_size, options.num_fid_samples) == (Path("out"), 8, 100)
    assert (options.seed, options.vae_name) == (3, "stabilityai/sd-vae-ft-mse")


def test_the_defaults_are_those_published():
    few, lots = sample(), many()
    for options in (few, lots):
        assert (options.sampler, options.num_inference_steps, options.seed) == ("ddpm", 250, 0)
        assert options.guidance_channels == 3
    assert few.guidance_scale is None  # which is 4, for a model that can be guided
    assert (lots.guidance_scale, lots.num_fid_samples, lots.per_proc_batch_size) == (1.5, 50_000, 32)
    assert lots.labels == "uniform"


@pytest.mark.parametrize(("size", "latent"), [(256, 32), (512, 64)])
def test_the_shipped_recipes_are_the_papers(size, latent):
    options = sample("-c", str(ROOT / f"configs/sample-dit-xl-2-{size}.yaml"), "--ckpt", "weights")
    assert options == sample(
        *f"--model DiT-XL/2 --image-size {size} --num-classes 1000 --guidance-scale 4 --ckpt weights".split(),
        *("-c", str(ROOT / f"configs/sample-dit-xl-2-{size}.yaml")),
    )
    assert (options.sampler, options.num_inference_steps, options.precision) == ("ddpm", 250, "fp32")
    options.check_model(DiTConfig.from_preset("DiT-XL/2", sample_size=latent), factor=8)


def test_others_recipes_are_understood_and_the_command_line_wins(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("sampling_steps: 40\nguidance_scale: 7.5\nseed: 42\nddim_sampling: true\nuse_fp16: true\n")
    options = sample("-c", str(path))
    assert (options.num_inference_steps, options.guidance_scale, options.seed) == (40, 7.5, 42)
    assert (options.sampler, options.precision) == ("ddim", "fp16")
    options = sample("--sampler", "dpm-solver++", "--precision", "fp32", "--cfg-scale", "2", "-c", str(path))
    assert (options.sampler, options.precision, options.guidance_scale) == ("dpm-solver++", "fp32", 2.0)
    path.write_text("ddim_sampling: false\nuse_fp16: false\nsampling-steps: 40\n")
    options = sample("-c", str(path))
    assert (options.sampler, options.precision) == ("ddpm", "fp32")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ddim_sampling: true\nsampler: ddim\n", "'ddim_sampling' and 'sampler' say the same thing"),
        ("ddim_sampling: maybe\n", "'ddim_sampling' must be true or false, got 'maybe'"),
        ("ddim_samplng: true\n", "Did you mean 'ddim_sampling'"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(tmp_path, text, told):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        sample("-c", str(path))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "say which weights to draw with: --ckpt"),
        (["--model", "DiT-XL/2"], "--model DiT-XL/2 names an architecture; give its weights with --ckpt"),
        (["--model", "DiT-XL2", "--ckpt", "weights"], "unknown model 'DiT-XL2'. Did you mean 'DiT-XL/2'"),
    ],
)
def test_weights_that_were_not_named_are_asked_for(argv, told):
    options = sample(*argv)
    with pytest.raises(ConfigError, match=told):
        _ = options.path


def test_weights_may_be_named_either_way():
    assert sample("--model", "results").path == sample("--ckpt", "results").path == Path("results")
    sample("--model", "results", "--ckpt", "results").check_model(DiTConfig.from_preset("DiT-S/4"), factor=8)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--model", "DiT-S/2"], "DiT-S/2 has patch_size 2, the weights in w 4; correct --model or --ckpt"),
        (["--image-size", "512"], "--image-size 512, but w draws images of 256x256"),
        (["--num-classes", "10"], "--num-classes 10, but w has 1000"),
    ],
)
def test_weights_that_are_not_what_was_said_are_refused(argv, told):
    with pytest.raises(ConfigError, match=told):
        sample("--ckpt", "w", *argv).check_model(DiTConfig.from_preset("DiT-S/4"), factor=8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (SampleOptions(batch_size=0), "--batch-size must be 1 or more"),
        (SampleOptions(first_index=-1), "--first-index must be 0 to"),
        (ManyOptions(num_fid_samples=0), "--num-fid-samples must be 1 or more"),
        (ManyOptions(per_proc_batch_size=0), "--per-proc-batch-size must be 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        options.check()
