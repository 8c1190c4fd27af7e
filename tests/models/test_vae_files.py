"""The VAE is found, checked and loaded without trusting its files."""

import json
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import paddle
import pytest

from paddle_dit.errors import CheckpointError, ConversionError
from paddle_dit.models.vae import VaeFiles, find_vae, load_vae
from tests.conftest import ROOT


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
        ConversionError, match=r"place config.json and diffusion_paddle_model.safetensors or diffusion_pytorch"
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


def test_the_projects_own_vae_is_found_from_anywhere_and_a_nearer_one_first(vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_vae("data/digits_vae").config.scaling_factor != 0.5
    vae.save_pretrained(str(tmp_path / "data" / "digits_vae"))
    assert load_vae("data/digits_vae").config.scaling_factor == 0.5


@pytest.mark.parametrize("name", ["data/nowhere", "./nowhere", "../nowhere", "/nowhere", "some/where/else", "nowhere"])
def test_what_looks_like_a_folder_is_not_downloaded(name, monkeypatch):
    monkeypatch.setattr("paddle_dit.models.vae_files._download", lambda name: pytest.fail(f"downloads {name}"))
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
        ({"out_channels": 6}, "makes images of 6 channels; give a VAE for RGB images"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL, not an AutoencoderKL"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "asymmetric: its encoder has 2 blocks and its decoder 3, "),
        ({"up_block_out_channels": [8, 8, 8]}, "does not describe an AutoencoderKL .channels and blocks differ"),
        ({"block_out_channels": [8, 8, 8]}, "does not describe an AutoencoderKL .channels and blocks differ"),
    ],
)
def test_files_that_cannot_encode_images_are_refused_unloaded(vae, tmp_path, change, message):
    vae.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    for look in (find_vae, load_vae):
        with pytest.raises(ConversionError, match=message):
            look(tmp_path)


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


HOLDS = """
import sys
from pathlib import Path
from paddle_dit.models import vae_files
with vae_files._one_at_a_time(Path(sys.argv[1])):
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
