"""Run by a Python that has PyTorch and diffusers: makes and runs real models, answers by files.

    python peer.py JOB FOLDER

Inputs are FOLDER/inputs.npz, outputs FOLDER/outputs.npz, and job.json says what a model is.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch


def randomized(model):
    """Give every parameter random numbers, so that no layer is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def make_dit(folder, job):
    from diffusers import DiTTransformer2DModel

    model = randomized(DiTTransformer2DModel(**job["config"]))
    first, *others = model.transformer_blocks
    for block in others:  # a DiT has these once, and every block a copy
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    model.save_pretrained(folder / "made", **job.get("save", {}))
    answer_dit(model, folder)


def run_dit(folder, job):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(job["model"]).eval()
    if job.get("exact"):
        from paddle_dit.conversion import exact_frequencies

        model = exact_frequencies(SimpleNamespace(transformer=model)).transformer
    answer_dit(model, folder)


def answer_dit(model, folder):
    x, timesteps, labels = (torch.from_numpy(array) for array in np.load(folder / "inputs.npz").values())
    with torch.no_grad():
        out = model(x, timesteps, labels).sample
    np.savez(folder / "outputs.npz", out=out.numpy())


def make_vae(folder, job):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = randomized(AutoencoderKL(**job["config"]))
    model.save_pretrained(folder / "made", **job.get("save", {}))
    if "compvis" in job:  # names made here, and read by diffusers' own converter
        ours = {new: model.state_dict()[old].clone() for new, old in job["compvis"].items()}
        for name in ours:
            if ".attn_1." in name and name.endswith(".weight") and ".norm." not in name:
                ours[name] = ours[name][:, :, None, None]
        theirs = convert_ldm_vae_checkpoint(dict(ours), job["config"])
        model.load_state_dict(theirs)
        beside = {f"first_stage_model.{name}": value for name, value in ours.items()} | {"cond.x": torch.zeros(2)}
        torch.save({"state_dict": beside if job["beside"] else ours, "global_step": 3}, folder / "vae.ckpt")
    images = torch.from_numpy(np.load(folder / "inputs.npz")["images"])
    with torch.no_grad():
        latents = model.encode(images).latent_dist.mean
        out = model.decode(latents).sample
    np.savez(folder / "outputs.npz", latents=latents.numpy(), out=out.numpy())


def save_tables(folder, job):
    """Save numpy tables as PyTorch does, nested or not."""
    from argparse import Namespace
    from collections import OrderedDict

    tables = {}
    for key, array in np.load(folder / "inputs.npz").items():
        table, name = key.split("|")
        tables.setdefault(table, OrderedDict())[name] = torch.from_numpy(array)
    if job["nested"]:
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        torch.save({**tables, "opt": optimizer, "args": Namespace(**job["args"])}, folder / job["file"])
    else:
        torch.save(next(iter(tables.values())), folder / job["file"])


def write_facebook(folder, job):
    """Write the paper's state dict as ``.pt`` by the project's own code, then load it as the paper's code does."""
    from paddle_dit.conversion.outputs import write_model
    from paddle_dit.conversion.sources import open_model

    source = open_model(job["model"])
    write_model(source.tensors, source.info, folder / "out.pt", "facebook")
    loaded = torch.load(folder / "out.pt", weights_only=True)
    np.savez(folder / "outputs.npz", **{name: tensor.numpy() for name, tensor in loaded.items()})


if __name__ == "__main__":
    where = Path(sys.argv[2])
    globals()[sys.argv[1]](where, json.loads((where / "job.json").read_text()))
