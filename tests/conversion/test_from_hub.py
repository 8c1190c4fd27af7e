"""Which of a hub model's files hold the DiT."""

import pytest

from paddle_dit.conversion.from_hub import dit_files, find_model
from paddle_dit.errors import CheckpointError, ConversionError

DIFFUSERS = ["README.md", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"]
DIFFUSERS += ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (
            [*DIFFUSERS, "transformer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.safetensors"],
            ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"],
        ),
        (
            [*DIFFUSERS, "transformer/diffusion_pytorch_model.bin"],
            ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.bin"],
        ),
        (
            ["config.json", "model_state.pdparams", "diffusion_paddle_model.safetensors"],
            ["config.json", "diffusion_paddle_model.safetensors"],
        ),
        (
            [
                "config.json",
                "diffusion_pytorch_model.safetensors.index.json",
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
                "diffusion_pytorch_model.fp16.safetensors",
            ],
            [
                "config.json",
                "diffusion_pytorch_model.safetensors.index.json",
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
            ],
        ),
        (["README.md", "DiT-XL-2-256x256.pt"], ["DiT-XL-2-256x256.pt"]),
        (
            ["config.json", "ema.safetensors", "manifest.json", "model.safetensors", "samples/a.png", "state.json"],
            ["config.json", "ema.safetensors", "manifest.json", "model.safetensors", "state.json"],
        ),
    ],
)
def test_the_best_form_is_taken_once(files, chosen):
    assert dit_files(files) == chosen


@pytest.mark.parametrize(
    ("files", "told"), [(["README.md"], "holds no weights"), (["a.pt", "b.pt"], r"2 single files \(a.pt, b.pt\)")]
)
def test_what_cannot_be_told_apart_is_refused(files, told):
    with pytest.raises(ConversionError, match=told):
        dit_files(files)


def test_what_is_there_needs_no_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name").resolve() == tmp_path / "owner" / "name"
    with pytest.raises(CheckpointError, match="there is no file or folder one/two/three; give one"):
        find_model("one/two/three")
