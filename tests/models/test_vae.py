"""The VAE is found, checked and loaded without trusting its files, and its conventions are the paper's."""

import json
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import paddle
import pytest

from paddle_dit.errors import CheckpointError, ConfigError, ConversionError
from paddle_dit.models.vae import VaeFiles, check_fits, decode, encode, find_vae, load_vae
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def vae():
    from ppdiffusers import AutoencoderKL

    paddle.seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, scaling_factor=0.5)
    vae.eval()
    return vae


def same_weights(left, right):
    return all(
        np.array_equal(left.state_dict()[name].numpy(), right.state_dict()[name].numpy()) for name in left.state_dict()
    )


@pytest.mark.parametrize("safe", [True, False])
def test_folder_and_pipeline_folder(vae, tmp_path, safe):
    vae.save_pretrained(str(tmp_path / "pipe" / "vae"), safe_serialization=safe)
    for path in (tmp_path / "pipe", tmp_path / "pipe" / "vae"):
        loaded = load_vae(path)
        assert not loaded.training
        assert loaded.config.scaling_factor == 0.5
        assert same_weights(loaded, vae)


def test_hub_name_is_taken_from_the_cache_or_explained(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("ppdiffusers.utils.PPDIFFUSERS_CACHE", str(tmp_path))
    monkeypatch.setattr("ppdiffusers.utils._get_model_file", lambda *_, **__: (_ for _ in ()).throw(OSError))
    with pytest.raises(
        ConversionError, match=r"place config.json and diffusion_paddle_model.safetensors or model_state"
    ):
        load_vae("someone/some-vae")
    vae.save_pretrained(str(tmp_path / "someone" / "some-vae"))
    assert same_weights(load_vae("someone/some-vae"), vae)


def test_old_attention_names(vae, tmp_path):
    vae.save_pretrained(str(tmp_path), safe_serialization=False)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = tmp_path / "model_state.pdparams"
    tensors = {name: tensor.numpy() for name, tensor in vae.state_dict().items()}
    for new, name in old.items():
        tensors = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in tensors.items()
        }
    assert any("query" in name for name in tensors)
    paddle.save(tensors, str(path))
    assert same_weights(load_vae(tmp_path), vae)


def test_a_malicious_pickle_is_not_run(vae, tmp_path):
    vae.save_pretrained(str(tmp_path / "vae"), safe_serialization=False)
    call = f"cos\nmkdir\n(V{tmp_path / 'made'}\ntR."
    (tmp_path / "vae" / "model_state.pdparams").write_bytes(call.encode())
    with pytest.raises(ConversionError, match=r"os.mkdir"):
        load_vae(tmp_path / "vae")
    assert not (tmp_path / "made").exists()
    pickle.loads(call.encode())
    assert (tmp_path / "made").exists()


def test_what_is_no_vae_is_said(vae, tmp_path):
    with pytest.raises(ConversionError, match="no such VAE folder"):
        load_vae(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"holds no VAE; place config\.json"):
        load_vae(tmp_path / "empty")
    vae.save_pretrained(str(tmp_path / "vae"))
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DModel"}, "UNet2DModel, not an AutoencoderKL"),
        ({"block_out_channels": "wide"}, "does not describe an AutoencoderKL"),
    ):
        (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConversionError, match=message):
            load_vae(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "block_out_channels": [8, 12]}))
    with pytest.raises(CheckpointError, match="another model's weights"):
        load_vae(tmp_path / "vae")
    shutil.move(tmp_path / "vae" / "diffusion_paddle_model.safetensors", tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match="holds no weights"):
        load_vae(tmp_path / "vae")


def test_encode_scales_the_mean_or_a_draw(vae):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    noise = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(images)).latent_dist
    mean, std = posterior.mean.numpy(), posterior.std.numpy()
    assert encode(vae, images).dtype == np.float32
    assert np.allclose(encode(vae, images), 0.5 * mean, atol=1e-6)
    assert np.allclose(encode(vae, images, noise), 0.5 * (mean + std * noise), atol=1e-6)


def test_decode_rounds_as_the_papers_evaluation(vae):
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8), dtype=np.float32)
    with paddle.no_grad():
        pictures = vae.decode(paddle.to_tensor(latents / 0.5)).sample.numpy()
    expected = np.clip(127.5 * pictures + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    images = decode(vae, latents, batch_size=2)
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_channels_that_do_not_fit(vae):
    with pytest.raises(ConfigError, match="VAE's latents have 4 channels, the model's 3"):
        decode(vae, np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ConfigError, match="images of 3 channels, got 1"):
        encode(vae, np.zeros((1, 1, 16, 16), np.float32))


def test_another_scale_than_the_training_latents(vae):
    for trained in (None, {"name": "v"}, {"name": "v", "scaling_factor": 0.5}, {"scaling_factor": 0.50001}):
        check_fits(vae, 4, trained)
    with pytest.raises(ConfigError, match=r"scales latents by 0\.5, .*\(other\) by 0\.18215; give that one with --vae"):
        check_fits(vae, 4, {"name": "other", "scaling_factor": 0.18215})


def test_the_projects_own_vae_is_found_from_anywhere_and_a_nearer_one_first(vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_vae("data/digits_vae").config.scaling_factor != 0.5
    vae.save_pretrained(str(tmp_path / "data" / "digits_vae"))
    assert load_vae("data/digits_vae").config.scaling_factor == 0.5


@pytest.mark.parametrize("name", ["data/nowhere", "./nowhere", "../nowhere", "/nowhere", "some/where/else", "nowhere"])
def test_what_looks_like_a_folder_is_not_downloaded(name, monkeypatch):
    monkeypatch.setattr("paddle_dit.models.vae._download", lambda name: pytest.fail(f"downloads {name}"))
    with pytest.raises(ConversionError, match=f"no such VAE folder: {name}"):
        load_vae(name)


def test_its_files_tell_what_it_makes_of_images_before_it_is_loaded(vae, tmp_path):
    vae.save_pretrained(str(tmp_path / "pipe" / "vae"))
    found = find_vae(tmp_path / "pipe")
    assert found == VaeFiles(str(tmp_path / "pipe"), 4, 2, 0.5, found.fingerprint)
    assert find_vae(tmp_path / "pipe", fingerprint=False).fingerprint == ""
    digits = find_vae("data/digits_vae")
    assert (digits.latent_channels, digits.factor, digits.scaling_factor) == (4, 4, 0.9859727621078491)


def test_a_fingerprint_is_of_weights_and_scale_not_of_the_name(vae, tmp_path):
    for name in ("one", "two"):
        vae.save_pretrained(str(tmp_path / name))
    one = find_vae(tmp_path / "one").fingerprint
    assert find_vae(tmp_path / "two").fingerprint == one
    path = tmp_path / "two" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.25}))
    assert find_vae(tmp_path / "two").fingerprint != one
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    weights = tmp_path / "three" / "diffusion_paddle_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert find_vae(tmp_path / "three").fingerprint != one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "UNet2DModel, not an AutoencoderKL"),
        ({"block_out_channels": 8}, "does not describe an AutoencoderKL"),
        ({"block_out_channels": []}, "does not describe an AutoencoderKL"),
        ({"latent_channels": "4"}, "does not describe an AutoencoderKL"),
        ({"scaling_factor": None}, "does not describe an AutoencoderKL"),
        ({"scaling_factor": 0}, "does not describe an AutoencoderKL"),
        ({"in_channels": 1}, "takes images of 1 channels; give a VAE for RGB images"),
    ],
)
def test_files_that_cannot_encode_images_are_refused_unloaded(vae, tmp_path, change, message):
    vae.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConversionError, match=message):
        find_vae(tmp_path)


def test_files_without_weights_are_refused_unloaded(vae, tmp_path):
    vae.save_pretrained(str(tmp_path))
    (tmp_path / "diffusion_paddle_model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"holds no weights; place diffusion_paddle_model\.safetensors or"):
        find_vae(tmp_path)


def test_loading_changes_no_random_numbers(vae, tmp_path):
    vae.save_pretrained(str(tmp_path))
    paddle.seed(5)
    expected = paddle.randn([4]).numpy()
    paddle.seed(5)
    load_vae(tmp_path)
    np.testing.assert_array_equal(paddle.randn([4]).numpy(), expected)


LOADS = """
import signal
import paddle  # which has handlers of its own
signal.signal(signal.SIGTERM, lambda *_: print("ours", flush=True))
from paddle_dit.models.vae import load_vae
load_vae("data/digits_vae")
signal.raise_signal(signal.SIGTERM)
"""


def test_loading_leaves_the_handlers_of_signals(run_command, tmp_path):
    (tmp_path / "loads.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOADS}")
    result = run_command(tmp_path / "loads.py")
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, ["ours"]), result.stderr


def test_a_tensor_is_encoded_as_an_array_is(vae):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(encode(vae, paddle.to_tensor(images)), encode(vae, images))


HOLDS = """
import sys
from pathlib import Path
from paddle_dit.models import vae
with vae._one_at_a_time(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


class InterruptedWaiting(Exception):
    """Raised by an alarm."""


def test_the_ranks_of_a_machine_look_for_a_model_one_after_another(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("ppdiffusers.utils.PPDIFFUSERS_CACHE", str(tmp_path))
    vae.save_pretrained(str(tmp_path / "someone" / "some-vae"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == "held\n"

        def late(*_):
            raise InterruptedWaiting

        former = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(InterruptedWaiting):
            find_vae("someone/some-vae")
        signal.signal(signal.SIGALRM, former)
        other.stdin.close()
        assert find_vae("someone/some-vae").factor == 2


def test_a_cache_that_cannot_be_written_can_be_read(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("ppdiffusers.utils.PPDIFFUSERS_CACHE", str(tmp_path))
    vae.save_pretrained(str(tmp_path / "someone" / "some-vae"))
    (tmp_path / ".paddle_dit.lock").mkdir()  # cannot be opened, by root either
    assert find_vae("someone/some-vae").factor == 2
