import dataclasses
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from PIL import Image

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.data.classes import PAPER_CLASSES
from paddle_dit.data.digits import DIGIT_NAMES
from paddle_dit.diffusion.options import SamplingOptions
from paddle_dit.errors import ConfigError
from paddle_dit.generation import generate_latents
from paddle_dit.models.dit import DiT
from paddle_dit.models.vae import decode, load_vae
from paddle_dit.pictures import labelled_grid, stacked
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.sampling_preview import PreviewOptions, SamplingPreview
from tests.conftest import ROOT
from tests.half_precision import use_float16_weights

DIGITS_VAE = {"name": "data/digits_vae", "scaling_factor": 0.98597276}
CONFIG = DiTConfig(sample_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10)
INFO = ModelInfo(CONFIG, DIGIT_NAMES, DIGITS_VAE)
QUICK = PreviewOptions(num_inference_steps=4)
WORKER = """
import sys
sys.path.insert(0, {root!r})
from paddle_dit import runtime
runtime.prepare()
from tests.training.test_sampling_preview import draw_on_this_rank
draw_on_this_rank({folder!r})
"""


def random_model(config=CONFIG, seed=0):
    random, model = np.random.default_rng(seed), DiT(config)
    for weight in model.parameters():  # the initial zeros would predict no noise at all
        weight.set_value(0.05 * random.standard_normal(weight.shape).astype(np.float32))
    return model


def decoded(latents):
    return decode(load_vae("data/digits_vae"), latents, batch_size=1)  # the batch decides on the rounding


@pytest.fixture
def shown():
    """Images that a preview handed to VisualDL: tag and step -> array."""
    return {}


@pytest.fixture
def preview(tmp_path, shown):
    """Return a function that makes a preview writing into ``tmp_path`` and ``shown``."""

    def make(info=INFO, options=QUICK):
        return SamplingPreview(
            info, options, Ranks(), tmp_path, lambda tag, image, step: shown.update({(tag, step): image})
        )

    return make


def test_pictures_are_decoded_in_the_runs_precision(preview, tmp_path, monkeypatch):
    asked = dataclasses.replace(QUICK, precision="fp16")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        preview(options=asked)
    narrow, model = {}, random_model()
    for options in (QUICK, asked):
        made = preview(options=options)
        use_float16_weights(monkeypatch, lambda made=made: made._vae)
        made.draw(model, 1)
        narrow[options.precision] = pixels(tmp_path / "samples" / "step-0000001.png").astype(int)
    assert 0 < np.abs(narrow["fp16"] - narrow["fp32"]).max() <= 4


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path):
    return np.asarray(Image.open(path))


def test_it_shows_what_the_training_schedule_draws_at_each_guidance(preview, tmp_path, shown):
    model = random_model()
    preview().draw(model, 1000)
    model.eval()
    labels = range(8)
    names, rows = [DIGIT_NAMES[label] for label in labels], {}
    for scale in (1.0, 4.0):
        images = decoded(generate_latents(model, labels, SamplingOptions("ddim", 4, scale)))
        expected = np.asarray(labelled_grid(images, names, columns=4, cell=64))
        np.testing.assert_array_equal(shown.pop((f"samples/cfg {scale}", 1000)), expected)
        rows[f"step 1,000, guidance {scale}"] = labelled_grid(images, names, columns=8, cell=64)
    assert not shown
    assert files(tmp_path) == ["samples/step-0001000.png"]
    np.testing.assert_array_equal(pixels(tmp_path / "samples" / "step-0001000.png"), np.asarray(stacked(rows)))


def test_only_the_weights_change_an_image(preview, shown):
    model, one = random_model(), preview()
    one.draw(model, 10)
    preview().draw(model, 20)  # as a run that was continued
    one.draw(random_model(seed=1), 30)
    for tag in ("samples/cfg 1.0", "samples/cfg 4.0"):
        np.testing.assert_array_equal(shown[tag, 20], shown[tag, 10])
        assert np.abs(shown[tag, 30].astype(int) - shown[tag, 10]).max() > 50


@pytest.mark.parametrize("training", [True, False])
def test_training_is_not_disturbed(preview, training):
    model = random_model()
    model.train() if training else model.eval()
    before = [weight.numpy() for weight in model.parameters()]
    paddle.seed(5)
    np.random.seed(5)
    expected = paddle.randn([4]).numpy(), np.random.rand(4)
    paddle.seed(5)
    np.random.seed(5)
    modes = []
    preview().draw(model, 1, lambda *inputs: modes.append((model.training, paddle.is_grad_enabled())) or model(*inputs))
    np.testing.assert_array_equal(paddle.randn([4]).numpy(), expected[0])
    np.testing.assert_array_equal(np.random.rand(4), expected[1])
    assert set(modes) == {(False, False)}
    assert model.training is training
    assert paddle.is_grad_enabled()
    for weight, value in zip(model.parameters(), before, strict=True):
        assert weight.grad is None
        np.testing.assert_array_equal(weight.numpy(), value)


def test_a_failing_model_is_training_again(preview):
    model = random_model()

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        preview().draw(model, 1, fail)
    assert model.training


def test_half_precision_predictions_are_drawn_from(preview, shown):
    model = random_model()
    preview().draw(model, 1)
    preview().draw(model, 2, lambda *inputs: model(*inputs).astype("bfloat16"))
    tag = "samples/cfg 1.0"
    assert 0 < np.abs(shown[tag, 2].astype(int) - shown[tag, 1]).mean() < 5


def test_training_latents_are_reconstructed_once(preview, tmp_path, shown):
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    first = preview()
    first.reconstruct(latents, np.array([7, 0, 9]))
    images = decoded(latents)
    expected = labelled_grid(images, ["seven", "zero", "nine"], columns=3, cell=64)
    np.testing.assert_array_equal(shown.pop(("samples/training latents", 0)), np.asarray(expected))
    file = tmp_path / "samples" / "training-latents.png"
    np.testing.assert_array_equal(pixels(file), np.asarray(stacked({"training latents, decoded": expected})))
    for again in (first, preview()):  # the second as a run that was continued
        again.reconstruct(-latents, [1, 2, 3])
    assert not shown


def test_training_latents_of_another_scaling_factor_than_the_vaes_own_are_shown_right(preview, shown):
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    own = load_vae("data/digits_vae").config.scaling_factor
    halved = {**DIGITS_VAE, "scaling_factor": own / 2, "config_scaling_factor": own}
    preview(dataclasses.replace(INFO, vae=halved)).reconstruct(latents / 2, np.array([7, 0, 9]))
    expected = labelled_grid(decoded(latents), ["seven", "zero", "nine"], columns=3, cell=64)
    np.testing.assert_array_equal(shown["samples/training latents", 0], np.asarray(expected))


@pytest.mark.parametrize(
    ("info", "named", "message"),
    [
        (ModelInfo(CONFIG), None, r"does not say which VAE made the latents; give --vae-name-or-path FOLDER"),
        (INFO, "no/such/folder", r"no such VAE folder: no/such/folder"),
        (ModelInfo(dataclasses.replace(CONFIG, in_channels=3)), "data/digits_vae", r"latents have 4 channels.*3"),
        (ModelInfo(CONFIG, None, {"name": "x", "scaling_factor": 0.5}), "data/digits_vae", r"scales latents by 0.98"),
    ],
)
def test_a_run_without_a_fitting_vae_is_warned_once(preview, tmp_path, shown, capfd, info, named, message):
    one, model = preview(info, dataclasses.replace(QUICK, vae=named)), random_model(info.config)
    for step in (1, 2):
        one.reconstruct(np.zeros((1, *info.config.sample_shape), np.float32), [0])
        one.draw(model, step)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: no preview images" in line]
    assert len(warnings) == 1
    assert re.search(message, warnings[0])
    assert not shown
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("fields", "caption"), [({"class_dropout_prob": 0.0}, "zero"), ({"num_classes": 0}, "no class")]
)
def test_a_model_that_cannot_be_guided_is_drawn_without(preview, tmp_path, shown, capfd, fields, caption):
    config = dataclasses.replace(CONFIG, **fields)
    one, model = preview(ModelInfo(config, DIGIT_NAMES, DIGITS_VAE)), random_model(config)
    one.draw(model, 1)
    one.draw(model, 2)
    assert list(shown) == [("samples/cfg 1.0", 1), ("samples/cfg 1.0", 2)]
    assert capfd.readouterr().err.count("this model cannot be guided") == 1
    model.eval()
    labels = one.class_labels
    images = decoded(generate_latents(model, labels, SamplingOptions("ddim", 4, 1.0)))
    captions = [caption if label == 0 else DIGIT_NAMES[label] for label in labels]
    np.testing.assert_array_equal(shown["samples/cfg 1.0", 1], np.asarray(labelled_grid(images, captions, 4, 64)))


def test_latents_of_an_unconditional_model_have_no_class(preview, shown):
    info = ModelInfo(dataclasses.replace(CONFIG, num_classes=0), None, DIGITS_VAE)
    latents = np.zeros((2, 4, 8, 8), np.float32)
    preview(info).reconstruct(latents, [3, 5])
    expected = labelled_grid(decoded(latents), ["no class"] * 2, 2, 64)
    np.testing.assert_array_equal(shown["samples/training latents", 0], np.asarray(expected))


def test_latents_of_other_shapes(preview, shown, tmp_path):
    from ppdiffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, sample_size=16)
    vae.save_pretrained(str(tmp_path / "vae"))
    config = dataclasses.replace(CONFIG, in_channels=2, sample_size=(16, 8), learn_sigma=False)
    options = dataclasses.replace(QUICK, vae=str(tmp_path / "vae"), guidance_scales=(4.0,), num_images=3)
    preview(ModelInfo(config), options).draw(random_model(config), 7)
    assert {key: image.shape for key, image in shown.items()} == {
        ("samples/cfg 4.0", 7): (128 + 18 + 2 * 4, 3 * 64 + 4 * 4, 3)
    }


def test_more_images_than_classes_take_the_classes_in_turn(preview):
    info = ModelInfo(dataclasses.replace(CONFIG, num_classes=3), None, DIGITS_VAE)
    one = preview(info, dataclasses.replace(QUICK, num_images=5))
    assert one.class_labels == [0, 1, 2, 0, 1]
    model = random_model(info.config)
    model.eval()
    latents = one.draw_latents(model, 1.0)
    assert latents.shape == (5, 4, 8, 8)
    assert np.abs(latents[3] - latents[0]).max() > 0.1, "the same class, but not the same noise"
    assert preview(ModelInfo(DiTConfig(depth=1))).class_labels == list(PAPER_CLASSES)


@pytest.mark.parametrize(
    "options",
    [
        *({"guidance_scales": scales} for scales in [(), (0.5,), (1.0, float("nan"))]),
        *({name: -1} for name in ("num_images", "num_inference_steps", "seed")),
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        PreviewOptions(**options)


def draw_on_this_rank(folder):
    """Draw what the test below compares; called on every rank, and by the test itself for one process."""
    ranks, folder, model = Ranks.join(), Path(folder), random_model()
    options = dataclasses.replace(QUICK, num_images=5)  # not a multiple of the ranks
    added = []
    preview = SamplingPreview(INFO, options, ranks, folder, lambda *shown: added.append(shown))
    without_vae = SamplingPreview(INFO, dataclasses.replace(options, vae="no/such/vae"), ranks, folder / "none", None)
    without_vae.draw(model, 1)  # a rank that waited here for the others would never reach the next line
    preview.draw(model, 1)
    preview.reconstruct(np.zeros((1, 4, 8, 8), np.float32), [0])
    assert len(added) == (3 if ranks.is_main else 0)
    unguided = dataclasses.replace(INFO, config=dataclasses.replace(CONFIG, class_dropout_prob=0.0))
    SamplingPreview(unguided, options, ranks, folder / "unguided", lambda *_: None).draw(
        random_model(unguided.config), 1
    )
    assert ranks.is_main or "ppdiffusers" not in sys.modules, "only the main rank needs a VAE"
    model.eval()
    drawn = {"apart": preview.draw_latents(model, 4.0)}
    if ranks.world_size > 1:  # both hold one model together, and so draw the same images
        sharing = SamplingPreview(INFO, options, Ranks(ranks.rank, 2, model_degree=2), folder, None)
        drawn["sharing"] = sharing.draw_latents(model, 4.0)
        dist.barrier()
    np.savez(folder / f"rank-{ranks.rank}.npz", **drawn)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_draw_what_one_draws(run_command, tmp_path):
    one, two, worker = tmp_path / "one", tmp_path / "two", tmp_path / "worker.py"
    for folder in (one, two):
        folder.mkdir()
    draw_on_this_rank(one)
    worker.write_text(WORKER.format(root=str(ROOT), folder=str(two)))
    result = run_command(worker, processes=2, log_dir=tmp_path / "log")
    assert result.returncode == 0, result.stdout + result.stderr
    assert files(one / "samples") == files(two / "samples") == ["step-0000001.png", "training-latents.png"]
    expected = np.load(one / "rank-0.npz")["apart"]
    rounding = 1e-5 * np.abs(expected).max()
    for rank, way in itertools.product(range(2), ("apart", "sharing")):
        np.testing.assert_allclose(np.load(two / f"rank-{rank}.npz")[way], expected, rtol=0, atol=rounding)
    difference = pixels(two / "samples" / "step-0000001.png").astype(int) - pixels(one / "samples" / "step-0000001.png")
    assert np.abs(difference).max() <= 1
    for line in ("warning: no preview images", "this model cannot be guided"):
        assert [(tmp_path / "log" / f"workerlog.{rank}").read_text().count(line) for rank in range(2)] == [1, 0]
