"""DiTPipeline folders: exact, verified before they appear, and loadable as the user does it."""

import copy
import json
import os
from dataclasses import replace

import numpy as np
import paddle
import pytest

from paddle_dit.config import ModelInfo
from paddle_dit.conversion import (
    exact_frequencies,
    keymaps,
    load_model,
    ppdiffusers_pipeline,
    read_pipeline,
    stock_parity,
    write_pipeline,
)
from paddle_dit.conversion.loading import build_dit
from paddle_dit.data.labels import imagenet_labels
from paddle_dit.diffusion.schedule import Schedule, ddim_steps
from paddle_dit.errors import CheckpointError, ConfigError, ConversionError
from paddle_dit.generation import load_generator
from paddle_dit.models.vae import load_vae

NAMES = {0: "zero"}


def random_batch(config, labels):
    """Return noise, timesteps and labels for one call."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((len(labels), *config.sample_shape), dtype=np.float32)
    timesteps = np.resize([0, 999, 345], len(labels))
    return [paddle.to_tensor(array) for array in (x, timesteps, np.array(labels))]


def load(folder):
    from ppdiffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("num_classes", [10, 1000, 1002])
def test_stock_outputs_equal_ours(tiny, tiny_vae, tmp_path, num_classes, shift, learn_sigma):
    tensors, info = tiny(num_classes=num_classes, frequency_shift=shift, learn_sigma=learn_sigma)
    report = write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    assert report.max_error <= 1e-5 * max(1, report.largest)
    assert (report.frequency_deviation > 1e-3) == (shift == 0)
    assert any("exact_frequencies" in note for note in report.notes) == (shift == 0)
    assert report.can_guide == (num_classes <= 1000)
    transformer = load(tmp_path / "pipe").transformer
    x, timesteps, labels = random_batch(info.config, [0, num_classes - 1, num_classes])
    stock_labels = labels.clip(max=num_classes - 1) + (labels == num_classes) * (
        max(1000, num_classes) - num_classes + 1
    )
    with paddle.no_grad():
        ours = build_dit(tensors, replace(info.config, frequency_shift=1), "test")(x, timesteps, labels)
        stock = transformer(x, timestep=timesteps, class_labels=stock_labels).sample
    assert ours.shape == [3, 8 if learn_sigma else 4, 8, 8]
    assert float((stock - ours).abs().max()) <= 1e-5 * max(1, report.largest)


def test_exact_frequencies_mends_a_model_of_the_papers_code(tiny, tiny_vae, tmp_path):
    tensors, info = tiny(frequency_shift=0)
    report = write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    transformer = exact_frequencies(load(tmp_path / "pipe")).transformer
    x, timesteps, labels = random_batch(info.config, [3, 9, 0])
    with paddle.no_grad():
        ours = build_dit(tensors, info.config, "test")(x, timesteps, labels)
        error = float((transformer(x, timestep=timesteps, class_labels=labels).sample - ours).abs().max())
    assert error <= 1e-5 * max(1, report.largest) < report.frequency_deviation


@pytest.mark.parametrize("weights_format", ["safetensors", "pdparams"])
def test_read_pipeline_is_bit_exact(tiny, tiny_vae, tmp_path, weights_format):
    tensors, info = tiny(
        frequency_shift=0, label_names={0: "zero", 9: "nine"}, vae={"name": "v", "scaling_factor": 0.5}
    )
    write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES, weights_format=weights_format)
    name = {"safetensors": "diffusion_paddle_model.safetensors", "pdparams": "model_state.pdparams"}[weights_format]
    assert all((tmp_path / "pipe" / part / name).is_file() for part in ("transformer", "vae"))
    back, back_info = read_pipeline(tmp_path / "pipe")
    assert back_info == info
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


def test_a_scaling_factor_that_was_overridden_for_the_latents_goes_into_the_folder(tiny, tiny_vae, tmp_path):
    vae = {"name": "v", "scaling_factor": 0.25, "config_scaling_factor": 0.5}
    tensors, info = tiny(vae=vae)
    folder = tmp_path / "pipe"
    report = write_pipeline(tensors, info, copy.deepcopy(tiny_vae), folder, id2label=NAMES)
    assert "vae/config.json has the training latents' scaling factor 0.25, this VAE's own is 0.5" in report.notes
    assert load(folder).vae.config.scaling_factor == 0.25
    assert load_generator(folder).vae.config.scaling_factor == 0.25
    again = write_pipeline(*read_pipeline(folder), load_vae(folder), tmp_path / "again", id2label=NAMES)
    assert load(tmp_path / "again").vae.config.scaling_factor == 0.25
    assert not any("scaling factor" in note for note in again.notes)


def test_a_folder_of_the_stock_class_is_read(tiny, tiny_vae, tmp_path):
    from ppdiffusers import DDIMScheduler, DiTPipeline, Transformer2DModel

    tensors, info = tiny(num_classes=1000)
    stock = Transformer2DModel(**ppdiffusers_pipeline.stock_config(info.config))
    stock.set_state_dict(keymaps.to_ppdiffusers(tensors, info.config))
    DiTPipeline(stock, tiny_vae, DDIMScheduler()).save_pretrained(str(tmp_path / "pipe"))
    model, read_info = load_model(tmp_path / "pipe")
    assert read_info == ModelInfo(info.config)  # the same architecture, without names
    stock.eval()
    x, timesteps, labels = random_batch(info.config, [3, 1000])
    with paddle.no_grad():
        error = model(x, timesteps, labels) - stock(x, timestep=timesteps, class_labels=labels).sample
    assert float(error.abs().max()) <= 1e-5


def swap_query_and_key(*args):
    for rule in real_block_rules(*args):
        if "qkv" in rule.ours:
            query, key, value = rule.theirs
            rule = replace(rule, theirs=(key, query, value))
        yield rule


real_block_rules = keymaps._block_rules


def test_a_wrong_table_is_caught_and_leaves_nothing(tiny, tiny_vae, tmp_path, monkeypatch):
    tensors, info = tiny()
    monkeypatch.setattr(keymaps, "_block_rules", swap_query_and_key)
    with pytest.raises(ConversionError, match="output differs from the model's by"):
        write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    assert os.listdir(tmp_path) == []


def test_broken_weights_are_caught_and_leave_nothing(tiny, tiny_vae, tmp_path, monkeypatch):
    tensors, info = tiny()
    write = ppdiffusers_pipeline._write_weights

    def damaged(path, right, *rest):
        write(path, {**right, "final_layer.linear.bias": right["final_layer.linear.bias"] + np.float32(1e-4)}, *rest)

    monkeypatch.setattr(ppdiffusers_pipeline, "_write_weights", damaged)
    with pytest.raises(ConversionError, match=r"'final_layer.linear.bias' read back differs"):
        write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    tensors["final_layer.linear.bias"][0] = np.nan
    with pytest.raises(ConversionError, match="holds NaN or infinity"):
        write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": (8, 16)}, "not square"),
        ({"sample_size": 128, "patch_size": 8}, "position table"),
        ({"mlp_ratio": 2.0}, "mlp_ratio"),
        ({"in_channels": 3}, "VAE's latents have 4 channels, the model's 3"),
    ],
)
def test_what_the_stock_class_cannot_do_is_refused(tiny, tiny_vae, tmp_path, fields, message):
    tensors, info = tiny(**fields)
    with pytest.raises((ConversionError, ConfigError), match=message):
        write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    assert os.listdir(tmp_path) == []


def test_a_vae_of_another_scale_is_refused(tiny, tiny_vae, tmp_path):
    tensors, info = tiny(vae={"name": "data/other_vae", "scaling_factor": 0.18215})
    with pytest.raises(ConfigError, match=r"scales latents by 0.5, .* \(data/other_vae\) by 0.18215"):
        write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)


def test_weights_of_another_model_are_refused(tiny, tiny_vae, tmp_path):
    tensors, info = tiny(depth=1)
    with pytest.raises((CheckpointError, ConversionError), match="missing"):
        write_pipeline(tensors, replace(info, config=tiny()[1].config), tiny_vae, tmp_path / "pipe", id2label=NAMES)
    assert os.listdir(tmp_path) == []


def test_overwriting(tiny, tiny_vae, tmp_path):
    tensors, info = tiny(depth=1)
    write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    other, _ = tiny(depth=1, seed=1)
    with pytest.raises(ConfigError, match="pass --overwrite"):
        write_pipeline(other, info, tiny_vae, tmp_path / "pipe", id2label=NAMES)
    write_pipeline(other, info, tiny_vae, tmp_path / "pipe", id2label=NAMES, overwrite=True)
    name = "final_layer.linear.bias"
    assert np.array_equal(read_pipeline(tmp_path / "pipe")[0][name], other[name])
    assert os.listdir(tmp_path) == ["pipe"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no DiTPipeline folder"):
        write_pipeline(tensors, info, tiny_vae, tmp_path / "home", id2label=NAMES, overwrite=True)


@pytest.mark.parametrize("fields", [{"class_dropout_prob": 0.0}, {"num_classes": 0}, {"num_classes": 1001}])
def test_models_that_the_stock_class_cannot_guide_still_convert(tiny, tiny_vae, tmp_path, fields):
    tensors, info = tiny(depth=1, **fields)
    report = write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label={}, scheduler="ddpm")
    assert report.can_guide == (info.config.num_classes == 0)
    assert any("guidance_scale=1" in note for note in report.notes) == (not report.can_guide)
    assert any("learned variance" in note for note in report.notes)
    images = load(tmp_path / "pipe")([0], guidance_scale=1, num_inference_steps=2).images
    assert images[0].size == (16, 16)


def test_the_users_snippet(tiny, tiny_vae, tmp_path):
    from ppdiffusers import DDIMScheduler, DiTPipeline

    tensors, info = tiny(num_classes=1000)
    write_pipeline(tensors, info, tiny_vae, tmp_path / "DiT", id2label=imagenet_labels(), scheduler="dpm-solver")
    pipe = DiTPipeline.from_pretrained(str(tmp_path / "DiT"))
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    class_ids = pipe.get_label_ids(["white shark"])
    assert class_ids == [2]
    images = pipe(class_labels=class_ids, num_inference_steps=4).images
    images[0].save(tmp_path / "white_shark.png")
    assert (tmp_path / "white_shark.png").stat().st_size > 0


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver", "ddpm"])
def test_schedulers_load_with_the_training_schedule(tiny, tiny_vae, tmp_path, scheduler):
    tensors, info = tiny(depth=1)
    write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES, scheduler=scheduler)
    stock = load(tmp_path / "pipe").scheduler
    assert np.allclose(stock.alphas_cumprod.numpy(), Schedule.linear().alphas_cumprod, rtol=1e-4)
    assert not stock.config.get("clip_sample", False)
    assert stock.config.prediction_type == "epsilon"


def test_stock_ddim_makes_our_steps(tiny, tiny_vae, tmp_path):
    from ppdiffusers import DDIMScheduler

    tensors, info = tiny(depth=1)
    write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=NAMES, scheduler="dpm-solver")
    stock = DDIMScheduler.from_config(load(tmp_path / "pipe").scheduler.config)
    stock.set_timesteps(25)
    steps = ddim_steps(Schedule.linear().respaced("ddim25"))
    assert stock.timesteps.tolist() == steps.timesteps.tolist()
    x, eps = paddle.to_tensor([0.7]), paddle.to_tensor([-0.3])
    for index, timestep in enumerate(steps.timesteps.tolist()):
        expected = steps.on_x[index] * 0.7 + steps.on_eps[index] * -0.3
        assert float(stock.step(eps, timestep, x).prev_sample) == pytest.approx(expected, abs=1e-4)


def test_the_index_names_the_classes(tiny, tiny_vae, tmp_path):
    tensors, info = tiny(depth=1)
    write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label={1: "one", 0: "zero, nought"})
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text(encoding="utf-8"))
    assert index["id2label"] == {"0": "zero, nought", "1": "one"}
    assert load(tmp_path / "pipe").get_label_ids(["nought", "one"]) == [0, 1]


def test_gate_looks_at_both_ends_of_the_schedule():
    assert {0, 999} <= set(stock_parity.TIMESTEPS)
