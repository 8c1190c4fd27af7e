"""What is written says what it cannot hold, and nothing of somebody else's is replaced or half written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import paddle_dit
from paddle_dit.conversion.convert import Request, convert
from paddle_dit.conversion.outputs import write_model
from paddle_dit.conversion.sources import open_model
from paddle_dit.data.digits import DIGITS_VAE_FOLDER
from paddle_dit.errors import ConfigError, ConversionError, PaddleDiTError


@pytest.mark.parametrize(("shift", "told"), [(0, False), (1, True)])
def test_a_state_dict_of_the_papers_code_cannot_say_the_shift(tiny, tmp_path, shift, told):
    tensors, info = tiny(frequency_shift=shift)
    write_model(tensors, info, tmp_path / "ours", "paddle_dit")
    rows = convert(Request(tmp_path / "ours", tmp_path / "x.safetensors", "facebook", verify=False))
    notes = " ".join(text for name, text in rows if name == "note")
    assert ("read it here with --frequency-shift 1" in notes) is told
    assert f"the {info.config.num_heads} heads" in notes


def test_what_the_papers_code_cannot_compute_is_refused(tiny, tmp_path):
    tensors, info = tiny(sample_size=(4, 8))
    with pytest.raises(ConversionError, match="its latents are 4x8, not square"):
        write_model(tensors, info, tmp_path / "x.safetensors", "facebook")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_library_is_not_replaced(tiny_config, tmp_path):
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["BertModel"]}')
    (other / "model.safetensors").write_bytes(b"years of work")
    with pytest.raises(ConfigError, match="exists"):
        paddle_dit.DiT(tiny_config).save_pretrained(other)
    assert (other / "model.safetensors").read_bytes() == b"years of work"


def test_a_folder_can_be_named_from_within(tiny, tmp_path, monkeypatch):
    tensors, info = tiny()
    write_model(tensors, info, tmp_path / "theirs", "diffusers")
    (tmp_path / "theirs" / "paddle_dit.json").unlink()
    monkeypatch.chdir(tmp_path / "theirs")
    assert open_model(Path(".")).info.config.depth == info.config.depth


def test_surplus_names_of_classes_are_left_out(tiny, tmp_path):
    tensors, info = tiny()
    write_model(tensors, replace(info, label_names=None), tmp_path / "pipe" / "transformer", "diffusers")
    (tmp_path / "pipe" / "transformer" / "paddle_dit.json").unlink()
    names = {str(label): f"class {label}" for label in range(1000)}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"id2label": names}))
    found = open_model(tmp_path / "pipe").info
    assert sorted(found.label_names) == list(range(found.config.num_classes))


@pytest.mark.parametrize(("key", "value"), [("norm_eps", None), ("norm_eps", "1e-6"), ("out_channels", "8")])
def test_a_configuration_with_no_number_is_one_line(tiny, tmp_path, key, value):
    tensors, info = tiny()
    write_model(tensors, info, tmp_path / "theirs", "diffusers")
    (tmp_path / "theirs" / "paddle_dit.json").unlink()
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConversionError, match=f"{key} is {value!r}, not a number"):
        open_model(tmp_path / "theirs")


@pytest.mark.parametrize("verify", [True, False])
def test_a_vae_that_lacks_tensors_is_refused(tmp_path, verify):
    shutil.copytree(DIGITS_VAE_FOLDER, tmp_path / "vae")
    path = next((tmp_path / "vae").glob("*.safetensors"))
    tensors = load_file(path)
    save_file({name: array for name, array in tensors.items() if "mid_block" not in name}, path, {"format": "pd"})
    with pytest.raises(PaddleDiTError, match="mid_block"):
        convert(Request(tmp_path / "vae", tmp_path / "out", verify=verify))
    assert not (tmp_path / "out").exists()
