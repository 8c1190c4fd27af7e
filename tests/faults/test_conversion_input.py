"""Whatever is wrong with a model that is to be converted, one line says it, and nothing is left of the output."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.architecture import Hints
from paddle_dit.conversion.convert import Request, convert
from paddle_dit.conversion.formats import DIFFUSERS, FACEBOOK
from paddle_dit.conversion.keymaps import split
from paddle_dit.conversion.ppdiffusers_pipeline import stock_config
from paddle_dit.errors import PaddleDiTError
from paddle_dit.models.refit import parameter_shapes
from paddle_dit.positions import sincos_position_table

from ..conversion.pytorch_files import write_pt
from .test_pickles import attack, table, tensor, write

CONFIG = DiTConfig(sample_size=8, hidden_size=48, depth=1, num_heads=3, num_classes=1000)


def weights(form=FACEBOOK):
    rng = np.random.default_rng(0)
    ours = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in parameter_shapes(CONFIG).items()}
    found = {name: np.ascontiguousarray(array) for name, array in split(form.rules(CONFIG), ours)}
    return found | ({"pos_embed": sincos_position_table(48, (4, 4))[None]} if form is FACEBOOK else {})


def diffusers_folder(folder, shards=0):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stock_config(CONFIG)))
    if not shards:
        save_file(weights(DIFFUSERS), folder / "diffusion_pytorch_model.safetensors")
        return folder
    parts = weights(DIFFUSERS)
    placed = {name: f"part-0000{1 + index % shards}-of-0000{shards}.safetensors" for index, name in enumerate(parts)}
    for file in set(placed.values()):
        save_file({name: array for name, array in parts.items() if placed[name] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    return folder


def foreign_globals(folder):
    return write(folder / "evil.pt", table(model=attack("os.system", folder)))


def a_training_framework(folder):
    callback = b"cpytorch_lightning.callbacks\nModelCheckpoint\n"
    return write(folder / "sd.ckpt", table(state_dict=table(x=tensor()), callbacks=callback))


def cut(folder):
    path = write_pt(folder / "weights.pt", weights())
    path.write_bytes(path.read_bytes()[:-100])
    return path


def unet(folder):
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((320, 4, 3, 3), np.float32)}, folder / "sd.pth"
    )
    return folder / "sd.pth"


def unet_of_diffusers(folder):
    (folder / "unet").mkdir()
    values = {"conv_in.weight": np.zeros((320, 4, 3, 3), np.float32), "time_embedding.linear_1.bias": np.zeros(9)}
    save_file(values, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder / "unet"


def halves(change, name="blocks.0.mlp.fc1.weight"):
    def spoil(folder):
        found = {key: array.astype(np.float16) for key, array in weights().items()}
        found[name][3] = change
        return write_pt(folder / "half.pt", found)

    return spoil


def lost_shard(folder):
    path = diffusers_folder(folder / "model", shards=3)
    (path / "part-00002-of-00003.safetensors").unlink()
    return path


def other_shard(folder):
    path = diffusers_folder(folder / "model", shards=2)
    shutil.copy(path / "part-00002-of-00002.safetensors", path / "part-00001-of-00002.safetensors")
    return path


def escaping_shard(folder):
    path = diffusers_folder(folder / "model", shards=2)
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    return path


def text(content):
    def spoil(folder):
        (folder / "notes.pt").write_text(content)
        return folder / "notes.pt"

    return spoil


def two_candidates(folder):
    (folder / "checkpoints").mkdir()
    for step in ("0050000.pt", "0100000.pt"):
        write_pt(folder / "checkpoints" / step, weights())
    return folder / "checkpoints"


def changed(**changes):
    def spoil(folder):
        found = {**weights(), **changes}
        return write_pt(folder / "x.pt", {name: array for name, array in found.items() if array is not None})

    return spoil


def integers(folder):
    save_file({**weights(), "final_layer.linear.bias": np.zeros(32, np.int64)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def doubles(folder):
    save_file({**weights(), "final_layer.linear.bias": np.full(32, 0.1)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def other_trainer(folder):
    (folder / "run" / "checkpoint-5").mkdir(parents=True)
    write(folder / "run" / "checkpoint-5" / "model_state.pdparams", b"}")
    return folder / "run"


def half_a_pipeline(folder):
    (folder / "pipe" / "transformer").mkdir(parents=True)
    (folder / "pipe" / "model_index.json").write_text("{}")
    return folder / "pipe"


FAULTS = {
    "foreign globals": (foreign_globals, "evil.pt is refused: it asks for 'os.system'"),
    "a training framework": (a_training_framework, "asks for 'pytorch_lightning.callbacks.ModelCheckpoint'"),
    "truncated zip": (cut, "weights.pt is cut short or no"),
    "UNet": (unet, "sd.pth: it holds the tensors of a UNet of Stable Diffusion; expected a DiT of"),
    "UNet of diffusers": (unet_of_diffusers, "it holds the tensors of a UNet of Stable Diffusion; expected a DiT of"),
    "infinity": (halves(np.inf), "half.pt: 'blocks.0.mlp.fc1.weight' (float16) holds NaN or infinity"),
    "NaN in the last tensor": (
        halves(np.nan, "final_layer.adaLN_modulation.1.bias"),
        "(float16) holds NaN or infinity",
    ),
    "a lost shard": (lost_shard, "names 3 files, of which 1 are missing: part-00002-of-00003.safetensors; fetch them"),
    "a shard of another": (other_shard, "part-00001-of-00002.safetensors does not hold the tensors that"),
    "a shard elsewhere": (escaping_shard, "must have a weight_map from tensors to files beside it"),
    "a text file": (text("weights\n"), "notes.pt is a text file; expected PyTorch's zip"),
    "an empty file": (text(""), "notes.pt is empty; expected PyTorch's zip"),
    "a page": (text("\n<html>404</html>"), "notes.pt is a page of HTML or XML"),
    "a pointer": (text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "a pointer of Git LFS"),
    "two candidates": (two_candidates, "holds 2 files of weights (0050000.pt, 0100000.pt), and one was expected"),
    "missing": (changed(**{"blocks.0.attn.qkv.bias": None}), "missing: blocks.0.attn.qkv.bias (1)"),
    "unexpected": (changed(extra=np.zeros(2, np.float32)), "unexpected: extra (1)"),
    "no first MLP": (changed(**{"blocks.0.mlp.fc1.bias": None}), "it lacks 'blocks.0.mlp.fc1.bias', without which"),
    "a wrong shape": (
        changed(**{"blocks.0.attn.qkv.weight": np.zeros((96, 48), np.float32)}),
        "'blocks.0.attn.qkv.weight' of shape (96, 48) does not fit",
    ),
    "a wrong output": (
        changed(**{"final_layer.linear.bias": np.zeros(33, np.float32)}),
        "has 33 numbers; patches of 2x2",
    ),
    "a wrong table": (changed(pos_embed=np.zeros((1, 15, 48), np.float32)), "is no position table of a square"),
    "integers": (integers, "'final_layer.linear.bias' holds int64 and should hold floats"),
    "doubles": (doubles, "(float64) holds numbers that float32 has not; save it as float32"),
    "another trainer's run": (other_trainer, "holds another trainer's checkpoints (checkpoint-5); name one of them"),
    "half a pipeline": (half_a_pipeline, "no weights in transformer/; fetch the whole folder"),
    "nothing": (lambda folder: folder / "nowhere", "there is no file or folder"),
    "an empty folder": (lambda folder: folder, "holds no checkpoint-<step> folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", ["paddle_dit", "diffusers"])
def test_one_line_names_the_fault_and_nothing_is_left(tmp_path, fault, target):
    spoil, told = FAULTS[fault]
    (tmp_path / "in").mkdir()
    source = spoil(tmp_path / "in")
    with pytest.raises(PaddleDiTError) as raised:
        convert(Request(source, tmp_path / "made" / "out", target, hints=Hints(num_heads=3), verify=False))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not (tmp_path / "in" / "made").exists()  # of an attack


def test_the_same_input_unspoilt_is_converted(tmp_path):
    path = write_pt(tmp_path / "weights.pt", weights())
    rows = dict(convert(Request(path, tmp_path / "out", hints=Hints(num_heads=3), verify=False)))
    assert rows["found"] == "facebook/DiT state dict"
    assert rows["outputs"] == "not compared (--no-verify)"
    for shards in (0, 3):
        folder = diffusers_folder(tmp_path / f"shards{shards}", shards)
        rows = dict(convert(Request(folder, tmp_path / f"out{shards}", verify=False)))
        assert rows["found"] == "diffusers DiT state dict"


def test_an_output_that_is_there_is_refused_and_kept(tmp_path):
    path = write_pt(tmp_path / "weights.pt", weights())
    (tmp_path / "out").mkdir()
    (tmp_path / "x.safetensors").write_text("mine")
    for output, target in (("out", None), ("out", "ppdiffusers"), ("x.safetensors", "facebook")):
        with pytest.raises(PaddleDiTError, match=f"{output} exists"):
            convert(Request(path, tmp_path / output, target, hints=Hints(num_heads=3), verify=False))
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("output", "target", "told"),
    [
        ("weights", "facebook", "let its name end in .safetensors or .pt"),
        ("weights.pt/x", None, "is a file; choose another folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_read(tmp_path, output, target, told):
    (tmp_path / "weights.pt").write_text("not read")
    with pytest.raises(PaddleDiTError, match=told):
        convert(Request(tmp_path / "weights.pt", tmp_path / output, target))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from paddle_dit import writers

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    path = write_pt(tmp_path / "weights.pt", weights())
    monkeypatch.setattr(writers, "flush_to_disk", full)
    with pytest.raises(OSError, match="No space"):
        convert(Request(path, tmp_path / "out", hints=Hints(num_heads=3), verify=False))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_disk_that_changes_a_number_is_noticed(tmp_path, monkeypatch):
    from paddle_dit.conversion import outputs

    def wrong(file, shapes, arrays, *rest):
        right(file, shapes, ((name, array + np.float32(name == "final_layer.linear.bias")) for name, array in arrays))

    right = outputs.write_safetensors
    path = write_pt(tmp_path / "weights.pt", weights())
    monkeypatch.setattr(outputs, "write_safetensors", wrong)
    with pytest.raises(PaddleDiTError, match=r"'final_layer.linear.bias' read back differs"):
        convert(Request(path, tmp_path / "out", hints=Hints(num_heads=3), verify=False))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_description_of_ours_that_does_not_fit_is_refused(tmp_path):
    folder = diffusers_folder(tmp_path / "model")
    ModelInfo(DiTConfig(sample_size=8, hidden_size=48, depth=2, num_heads=3)).save(folder / "paddle_dit.json")
    with pytest.raises(PaddleDiTError, match=r"missing: transformer_blocks.1.attn1.to_k.bias"):
        convert(Request(folder, tmp_path / "out", verify=False))
