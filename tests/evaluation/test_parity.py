"""The golden arrays cover every group; files of other models are made here in the reference's names and layout."""

import json

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.diffusion.guidance import guided
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.diffusion.samplers import ddim, ddpm
from paddle_dit.diffusion.schedule import Schedule
from paddle_dit.errors import PaddleDiTError
from paddle_dit.evaluation.parity import compare, relative
from paddle_dit.models.dit import DiT

from ..conftest import GOLDEN

GROUPS = {
    "position table", "forward", "cfg", "schedule", "respacing", "loss", "grad_norm (31 parameters)", "train",
    "ddpm50", "ddpm250", "ddim50",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return list(compare(GOLDEN / "dit_tiny.npz"))


def test_every_group_is_compared(rows):
    assert {row.name.split("/")[0] for row in rows} == GROUPS
    assert len(rows) == 30


def test_every_array_agrees_with_the_reference(rows):
    failed = [(row.name, row.error, row.tolerance) for row in rows if not row.passes]
    assert not failed


def test_a_wrong_array_is_found(tmp_path):
    with np.load(GOLDEN / "dit_tiny.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key.split("/")[0] in ("config", "weights", "forward")}
    arrays["weights/blocks.1.mlp.fc2.bias"] = arrays["weights/blocks.1.mlp.fc2.bias"] + 1e-3
    np.savez(tmp_path / "wrong.npz", **arrays)
    failed = {row.name for row in compare(tmp_path / "wrong.npz") if not row.passes}
    assert failed == {"forward/out", "forward/out_null"}


def test_non_finite_values_fail():
    assert relative("x", [np.nan], [1.0], 1.0).error == np.inf
    assert relative("x", [1.0], [np.nan], 1.0).error == np.inf


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "text.npz"
    path.write_text("hello")
    with pytest.raises(PaddleDiTError, match=r"no \.npz"):
        list(compare(path))


SMALL = {"sample_size": 8, "hidden_size": 48, "num_heads": 3, "frequency_shift": 0}
UNGUIDED = DiTConfig(
    **SMALL, patch_size=4, in_channels=2, depth=1, num_classes=7, class_dropout_prob=0.0, learn_sigma=False
)
GUIDED = DiTConfig(**SMALL, patch_size=2, in_channels=3, depth=3, num_classes=5)
FIXED_VARIANCE = DiTConfig(**SMALL, patch_size=2, in_channels=2, depth=1, num_classes=4, learn_sigma=False)


def facebook_config(config) -> dict:
    values = config.to_dict()
    unknown_there = ("sample_size", "frequency_shift", "norm_eps")
    return {"input_size": config.sample_size, **{key: values[key] for key in values if key not in unknown_there}}


def facebook_weights(model) -> dict:
    """Invert the conversion: linear weights [out, in], the patch projection a convolution, the position table."""
    patch, channels = model.config.patch_size, model.config.in_channels
    tensors = {"pos_embed": model.pos_embed.numpy()}
    for name, parameter in model.named_parameters():
        tensor = parameter.numpy()
        if tensor.ndim == 2 and "embedding_table" not in name:
            tensor = tensor.T
        tensors[name] = tensor.reshape(-1, channels, patch, patch) if name == "x_embedder.proj.weight" else tensor
    return tensors


def random_model(config):
    """Return a model without zero weights, which would hide differences."""
    random, model = np.random.default_rng(1), DiT(config)
    for parameter in model.parameters():
        parameter.set_value(0.1 * random.standard_normal(parameter.shape).astype(np.float32))
    model.eval()
    return model


@paddle.no_grad()
def add_outputs(arrays, model, scale) -> None:
    """Fill the groups forward, cfg, ddpm6 and ddim25 from their inputs."""
    x, t, y = (paddle.to_tensor(arrays[f"forward/{key}"]) for key in "xty")
    arrays["forward/out"] = model(x, t, y).numpy()
    options = {"guidance_scale": scale, "guidance_channels": min(3, model.config.in_channels)}
    denoise, schedule = guided(model, y, **options), Schedule.linear()
    if scale > 1:
        arrays["forward/out_null"] = model(x, t, paddle.full_like(y, model.config.null_class)).numpy()
        arrays["cfg/scale"] = np.float32(scale)
        parts = [part for part in denoise(x, t) if part is not None]
        arrays["cfg/out_three_channels"] = paddle.concat(parts, axis=1).numpy()
    noise = paddle.to_tensor(arrays["ddpm6/noise"])
    arrays["ddpm6/out"] = ddpm(denoise, x, schedule.respaced(6), lambda i: noise[i]).numpy()
    arrays["ddim25/out"] = ddim(denoise, x, schedule.respaced("ddim25"), None).numpy()


def reference_arrays(config, scale=1.0) -> dict:
    """Return what the reference's file would hold for a random model of this configuration."""
    random, model = np.random.default_rng(0), random_model(config)
    latents = random.standard_normal((4, 2, *config.sample_shape)).astype(np.float32)
    t, y = np.array([0, 700]), np.array([0, config.num_classes - 1])
    arrays = {"config": np.array(json.dumps(facebook_config(config)))}
    arrays |= {f"weights/{name}": tensor for name, tensor in facebook_weights(model).items()}
    arrays |= {"forward/x": latents[0], "forward/t": t, "forward/y": y}
    arrays |= {"ddpm6/noise": random.standard_normal((6, *latents[0].shape)).astype(np.float32)}
    for group in ("ddpm6", "ddim25"):
        arrays |= {f"{group}/z": latents[0], f"{group}/y": y}
    add_outputs(arrays, model, scale)
    arrays |= {"loss/x0": latents[1], "loss/noise": latents[2], "loss/t": t, "loss/y": y}
    losses = GaussianDiffusion().training_losses(model, *map(paddle.to_tensor, (latents[1], y, t, latents[2])))
    arrays |= {f"loss/{name}": value.numpy() for name, value in losses.items()}
    losses["loss"].mean().backward()
    arrays |= {f"grad_norm/{name}": p.grad.norm().numpy() for name, p in model.named_parameters()}
    arrays |= {f"train/{key}": arrays[f"loss/{key}"][None] for key in ("x0", "noise", "t", "y")}
    arrays["train/loss"] = losses["loss"].mean().numpy().reshape(1)
    arrays["schedule/alphas_cumprod_prev"] = Schedule.linear().alphas_cumprod_prev
    arrays["respacing/31"] = Schedule.linear().respaced(31).timesteps
    return arrays


@pytest.fixture(scope="module")
def unguided():
    return reference_arrays(UNGUIDED)


@pytest.fixture
def rows_of(tmp_path):
    """Return a function that saves arrays, without those that are None, and gives the rows of the file."""

    def compare_arrays(arrays) -> dict:
        path = tmp_path / "arrays.npz"
        np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
        return {row.name: row for row in compare(path)}

    return compare_arrays


def test_a_model_without_variance_and_null_class_passes(unguided, rows_of):
    rows = rows_of(unguided)
    assert {name for name, row in rows.items() if not row.passes} == set()
    assert set(rows) == {
        "position table", "forward/out", "schedule/alphas_cumprod_prev", "respacing/31", "loss/loss", "loss/mse",
        "grad_norm (21 parameters)", "train/loss", "ddpm6/out", "ddim25/out",
    }  # fmt: skip


@pytest.mark.parametrize("config", [GUIDED, FIXED_VARIANCE])
def test_other_guided_models_pass(config, rows_of):
    rows = rows_of(reference_arrays(config, scale=2.5))
    assert {name for name, row in rows.items() if not row.passes} == set()
    assert {"forward/out_null", "cfg/out_three_channels", "ddpm6/out"} < set(rows)


def test_what_is_unknown_is_listed_and_neither_passes_nor_fails(unguided, rows_of):
    unknown = {
        "extra/a": np.zeros(2),
        "extra/b": np.array("text"),
        "note": np.array("text"),
        "schedule/respaced": np.zeros(3),
        "schedule/log_snr": np.zeros(3),
        "respacing/cosine": np.zeros(3),
        "cfg/out_all_channels": np.zeros(3),
        "train/final/pos_embed": np.zeros(3),
    }
    rows = rows_of({**unguided, **unknown})
    listed = {name for name, row in rows.items() if not row.compared}
    assert listed == {"extra", *unknown} - {"extra/a", "extra/b"}
    assert all(row.passes is row.compared for row in rows.values())


@pytest.mark.parametrize(
    "missing",
    ["forward/t", "forward/out", "loss/x0", "loss/loss", "train/noise", "train/loss", "ddpm6/noise", "ddim25/out"],
)
def test_half_a_group_is_refused(unguided, rows_of, missing):
    with pytest.raises(PaddleDiTError, match=f"lacks '{missing}'"):
        rows_of({**unguided, missing: None})


def test_what_belongs_to_another_group_is_asked_for(unguided, rows_of):
    guided_output = {"cfg/out_three_channels": unguided["forward/out"]}
    with pytest.raises(PaddleDiTError, match="lacks 'cfg/scale'"):
        rows_of({**unguided, **guided_output})
    without_losses = {key: array for key, array in unguided.items() if not key.startswith("loss/")}
    with pytest.raises(PaddleDiTError, match="lacks 'loss/x0'"):
        rows_of(without_losses)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("config", None, "lacks 'config'"),
        ("config", np.array("[1]"), "must be a JSON object"),
        ("config", np.array("{"), "not JSON"),
        ("config", np.array(3.0), "not JSON"),
        ("config", np.array('{"input_size": 8, "depht": 1}'), "unknown key 'depht'"),
        ("config", np.array('{"input_size": 8, "mlp_ratio": "4"}'), "mlp_ratio must be of type float"),
        ("config", np.array('{"input_size": 7}'), "multiple of patch_size"),
        ("weights/blocks.0.mlp.fc1.bias", None, "missing: blocks.0.mlp.fc1.bias"),
        ("weights/blocks.0.mlp.fc1.bias", np.array("text"), "holds no numbers"),
        ("forward/x", np.zeros((2, 4, 8, 8)), "does not fit 'config'"),
        ("forward/y", np.array([0, 7]), "outside 0 to 6"),
        ("forward/y", np.array([0, 1, 2]), "number of samples"),
        ("ddpm6/noise", np.zeros((5, 2, 2, 8, 8)), "for each step"),
        ("loss/t", np.zeros(0), "holds no numbers"),
    ],
)
def test_damage_is_told_in_one_line(unguided, rows_of, key, value, told):
    with pytest.raises(PaddleDiTError, match=told):
        rows_of({**unguided, key: value})


@pytest.mark.parametrize("key", ["forward/out", "loss/mse", "ddpm6/out", "schedule/alphas_cumprod_prev"])
def test_another_shape_fails(unguided, rows_of, key):
    rows = rows_of({**unguided, key: unguided[key][:1]})
    assert [name for name, row in rows.items() if not row.passes] == [key]


def test_a_file_where_nothing_is_compared_does_not_pass(unguided, run_command, tmp_path):
    np.savez(tmp_path / "other.npz", config=unguided["config"], **{"schedule/log_snr": np.zeros(3)})
    result = run_command("scripts/check_parity.py", tmp_path / "other.npz")
    assert result.returncode == 1
    assert "nothing was compared" in result.stdout


def test_the_table_shows_what_was_not_compared(unguided, run_command, tmp_path):
    arrays = {key: unguided[key] for key in ("config", "schedule/alphas_cumprod_prev")}
    np.savez(tmp_path / "other.npz", **arrays, **{"extra/a": np.zeros(3)})
    result = run_command("scripts/check_parity.py", tmp_path / "other.npz")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-2].split() == ["extra", "-", "-", "-", "not", "compared"]
    assert result.stdout.endswith("1 of 1 within tolerance; 1 not compared\n")
