"""PyTorch's diffusers computes what our model computes, on weights converted either way."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.conversion import load_model
from paddle_dit.conversion.loading import build_dit, read_weights
from paddle_dit.conversion.outputs import write_model
from paddle_dit.models.vae import load_vae

from ..conftest import GOLDEN, ROOT

SHAPES = [  # as DiTConfig has them
    {"sample_size": 8, "patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 3, "num_classes": 1000},
    {"sample_size": 16, "patch_size": 4, "hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 1000},
    {"sample_size": 8, "patch_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 7},
    {"sample_size": 6, "patch_size": 2, "hidden_size": 96, "depth": 2, "num_heads": 1, "learn_sigma": False},
]
TOLERANCE = 1e-5


@pytest.fixture
def peer(tmp_path):
    """Return a function that runs a job of peer.py on inputs and gives its outputs, or skip."""
    python = os.environ.get("PADDLE_DIT_PEERS_PYTHON")
    if not python and not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
        pytest.skip("needs PyTorch and diffusers (requirements/peers.txt), here or in PADDLE_DIT_PEERS_PYTHON")

    def run(name, inputs=None, **job):
        np.savez(tmp_path / "inputs.npz", **(inputs or {}))
        (tmp_path / "job.json").write_text(json.dumps(job, default=str))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [python or sys.executable, Path(__file__).with_name("peer.py"), name, tmp_path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answer = tmp_path / "outputs.npz"
        return dict(np.load(answer)) if answer.exists() else {}

    return run


def inputs(config):
    rng = np.random.default_rng(1)
    labels = np.array([0, config.num_classes - 1, config.num_classes])
    x = rng.standard_normal((3, *config.sample_shape), dtype=np.float32)
    return {"x": x, "timesteps": np.array([0, 437, 999]), "labels": labels}


def outputs(model, given):
    with paddle.no_grad():
        return model(*map(paddle.to_tensor, given.values())).numpy()


def error(ours, theirs):
    return np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())


def diffusers_config(config, **changes):
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_layers": config.depth,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": 1e-6,
        **changes,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_of_diffusers_computes_the_same_here(peer, tmp_path, shape):
    config = DiTConfig(**shape)
    given = inputs(config)
    theirs = peer("make_dit", given, config=diffusers_config(config))["out"]
    model, info = load_model(tmp_path / "made")
    assert info.config == config
    assert error(outputs(model, given), theirs) <= TOLERANCE
    assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_our_model_computes_the_same_in_diffusers(peer, tiny, tmp_path, shape):
    tensors, info = tiny(**shape)
    write_model(tensors, info, tmp_path / "out", "diffusers")
    given = inputs(info.config)
    ours = outputs(build_dit(tensors, info.config, "test"), given)
    given["labels"] = np.where(given["labels"] == info.config.null_class, 1000, given["labels"])  # as DiTPipeline says
    assert error(ours, peer("run_dit", given, model=tmp_path / "out")["out"]) <= TOLERANCE


def test_a_model_of_the_papers_code_is_exact_in_diffusers_with_its_own_frequencies(peer, tiny, tmp_path):
    tensors, info = tiny(frequency_shift=0, num_classes=1000)
    write_model(tensors, info, tmp_path / "out", "diffusers")
    given = inputs(info.config)
    ours = outputs(build_dit(tensors, info.config, "test"), given)
    assert error(ours, peer("run_dit", given, model=tmp_path / "out")["out"]) > 1e-3
    assert error(ours, peer("run_dit", given, model=tmp_path / "out", exact=True)["out"]) <= TOLERANCE


@pytest.mark.parametrize(
    "save",
    [
        {"safe_serialization": False},
        {"max_shard_size": "100KB"},
        {"safe_serialization": False, "max_shard_size": "99KB"},
    ],
)
def test_pickled_and_sharded_folders_of_diffusers_are_the_same(peer, tmp_path, save):
    config = DiTConfig(**SHAPES[0])
    given = inputs(config)
    theirs = peer("make_dit", given, config=diffusers_config(config), save=save)["out"]
    files = {path.name for path in (tmp_path / "made").iterdir()}
    assert ("max_shard_size" in save) == any(name.endswith(".index.json") for name in files), files
    assert error(outputs(load_model(tmp_path / "made")[0], given), theirs) <= TOLERANCE


def test_the_epsilon_that_published_folders_have_moves_little(peer, tmp_path):
    config = DiTConfig(**SHAPES[0])
    given = inputs(config)
    theirs = peer("make_dit", given, config=diffusers_config(config, norm_eps=1e-5))["out"]
    assert error(outputs(load_model(tmp_path / "made")[0], given), theirs) <= 1e-4


def test_half_precision_of_diffusers_is_widened_exactly(peer, tmp_path):
    config = DiTConfig(**SHAPES[0])
    peer("make_dit", inputs(config), config=diffusers_config(config))
    single, _ = read_weights(tmp_path / "made")
    with np.load(GOLDEN / "dit_tiny.npz") as golden:
        weights = {f"w|{key[8:]}": golden[key].astype(np.float16) for key in golden.files if key.startswith("weights/")}
    peer("save_tables", weights, nested=False, file="half.pt")
    half, info = read_weights(tmp_path / "half.pt", num_heads=4)
    assert {array.dtype for array in [*single.values(), *half.values()]} == {np.dtype(np.float32)}
    bias = "blocks.1.mlp.fc1.bias"
    assert np.array_equal(half[bias], weights[f"w|{bias}"].astype(np.float32))
    assert info.config.depth == 2


def golden_weights():
    with np.load(GOLDEN / "dit_tiny.npz") as golden:
        return {key: golden[key] for key in golden.files if key.startswith(("weights/", "forward/"))}


def test_state_dicts_and_training_checkpoints_of_the_papers_code_compute_its_outputs(peer, tmp_path):
    golden = golden_weights()
    right = {key.removeprefix("weights/"): array for key, array in golden.items() if key.startswith("weights/")}
    peer("save_tables", {f"w|{name}": array for name, array in right.items()}, nested=False, file="bare.pt")
    tables = {f"ema|{name}": array for name, array in right.items()}
    tables |= {f"model|module.{name}": array + np.float32(name != "pos_embed") for name, array in right.items()}
    options = {"model": "DiT-XL/2", "num_classes": 10}
    peer("save_tables", tables, nested=True, file="0050000.pt", args={**options, "model": "mine"})
    given = {name: golden[f"forward/{name}"] for name in "xty"}
    for file in ("bare.pt", "0050000.pt"):
        model, info = load_model(tmp_path / file, num_heads=4)
        assert info.config.frequency_shift == 0
        assert np.abs(outputs(model, given) - golden["forward/out"]).max() <= TOLERANCE
    raw, _ = read_weights(tmp_path / "0050000.pt", "model", num_heads=4)
    assert np.array_equal(raw["final_layer.linear.bias"], right["final_layer.linear.bias"] + 1)
    peer("save_tables", tables, nested=True, file="wrong.pt", args=options)
    with pytest.raises(Exception, match=r"\('args'\) in wrong.pt contradicts the tensors: .*depth is 28 there, 2 in"):
        read_weights(tmp_path / "wrong.pt")


def test_the_papers_state_dict_as_pt_is_loaded_by_pytorch(peer, tiny, tmp_path):
    tensors, info = tiny()
    write_model(tensors, replace(info), tmp_path / "ours", "paddle_dit")
    found = peer("write_facebook", model=tmp_path / "ours")
    back, _ = read_weights(tmp_path / "out.pt", num_heads=3)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    assert found["pos_embed"].shape == (1, 16, 48)
    assert np.array_equal(found["blocks.0.attn.qkv.weight"], tensors["blocks.0.attn.qkv.weight"].T)


VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 16,
}


def compvis_names():
    """Return CompVis's name -> diffusers' name for the tensors of a VAE with two blocks each way, written out."""
    names = {}

    def add(theirs, ours, parts):
        for part in parts:
            for kind in ("weight", "bias"):
                theirs_part, ours_part = part if isinstance(part, tuple) else (part, part)
                names[f"{theirs}{theirs_part}.{kind}"] = f"{ours}{ours_part}.{kind}"

    resnet = ["norm1", "conv1", "norm2", "conv2"]
    attention = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]
    for side in ("encoder", "decoder"):
        add(f"{side}.", f"{side}.", ["conv_in", ("norm_out", "conv_norm_out"), "conv_out"])
        for index in (1, 2):
            add(f"{side}.mid.block_{index}.", f"{side}.mid_block.resnets.{index - 1}.", resnet)
        add(f"{side}.mid.attn_1.", f"{side}.mid_block.attentions.0.", attention)
    shortcut = ("nin_shortcut", "conv_shortcut")
    for block in (0, 1):
        for layer in (0, 1):
            more = [shortcut] if (block, layer) == (1, 0) else []
            add(f"encoder.down.{block}.block.{layer}.", f"encoder.down_blocks.{block}.resnets.{layer}.", resnet + more)
        for layer in (0, 1, 2):
            more = [shortcut] if (block, layer) == (0, 0) else []
            add(f"decoder.up.{block}.block.{layer}.", f"decoder.up_blocks.{1 - block}.resnets.{layer}.", resnet + more)
    add("encoder.down.0.downsample.", "encoder.down_blocks.0.downsamplers.0.", ["conv"])
    add("decoder.up.1.upsample.", "decoder.up_blocks.0.upsamplers.0.", ["conv"])
    add("", "", ["quant_conv", "post_quant_conv"])
    return names


def check_vae(place, found, images):
    vae = load_vae(place)
    with paddle.no_grad():
        latents = vae.encode(paddle.to_tensor(images)).latent_dist.mean
        out = vae.decode(latents).sample.numpy()
    assert error(latents.numpy(), found["latents"]) <= 1e-4
    assert error(out, found["out"]) <= 1e-4


@pytest.mark.parametrize("save", [{}, {"safe_serialization": False}])
def test_a_vae_of_diffusers_decodes_the_same_here(peer, tmp_path, save):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    found = peer("make_vae", {"images": images}, config=VAE, save=save)
    check_vae(tmp_path / "made", found, images)


@pytest.mark.parametrize("beside", [False, True])
def test_a_vae_of_compvis_decodes_the_same_here(peer, tmp_path, beside, run_command):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    found = peer("make_vae", {"images": images}, config=VAE, compvis=compvis_names(), beside=beside)
    check_vae(tmp_path / "vae.ckpt", found, images)
    done = run_command("scripts/convert_checkpoint.py", tmp_path / "vae.ckpt", tmp_path / "vae")
    assert done.returncode == 0, done.stderr
    assert "VAE of Stable Diffusion" in done.stdout
    check_vae(tmp_path / "vae", found, images)
