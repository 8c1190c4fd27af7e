"""The library's DiT loads and saves as users of diffusers expect."""

import numpy as np
import paddle
import pytest

import paddle_dit
from paddle_dit.config import ModelInfo
from paddle_dit.conversion.outputs import write_model
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.generation import load_generator


def test_a_model_is_saved_and_comes_back(tiny_config, tmp_path):
    model = paddle_dit.DiT(tiny_config)
    model.info = ModelInfo(tiny_config, {3: "three"}, {"name": "data/digits_vae", "scaling_factor": 0.9859727621078491})
    model.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", "model.safetensors"]
    back = paddle_dit.DiT.from_pretrained(str(tmp_path / "mine"))
    assert type(back) is paddle_dit.DiT
    assert back.info == model.info
    assert back.config == tiny_config
    assert not back.training
    for name, tensor in model.state_dict().items():
        assert np.array_equal(back.state_dict()[name].numpy(), tensor.numpy())
    assert load_generator(tmp_path / "mine").classes.name_of(3) == "three"  # what sample.py draws with


def test_saving_again_replaces_only_what_was_saved(tiny_config, tmp_path):
    first, second = paddle_dit.DiT(tiny_config), paddle_dit.DiT(tiny_config)
    first.save_pretrained(tmp_path / "mine")
    second.save_pretrained(tmp_path / "mine")
    table = "y_embedder.embedding_table.weight"
    back = paddle_dit.DiT.from_pretrained(tmp_path / "mine")
    assert np.array_equal(back.state_dict()[table].numpy(), second.state_dict()[table].numpy())
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists"):
        first.save_pretrained(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_damaged_weights_are_not_saved(tiny_config, tmp_path):
    model = paddle_dit.DiT(tiny_config)
    model.final_layer.linear.bias.set_value(paddle.full([32], np.nan))
    with pytest.raises(ConversionError, match=r"'final_layer.linear.bias' .*holds NaN or infinity"):
        model.save_pretrained(tmp_path / "deep" / "mine")
    assert list(tmp_path.iterdir()) == []


def test_any_format_can_be_loaded(tiny, tmp_path):
    tensors, info = tiny(frequency_shift=0)
    write_model(tensors, info, tmp_path / "x.safetensors", "facebook")
    model = paddle_dit.DiT.from_pretrained(tmp_path / "x.safetensors", num_heads=3)
    assert model.config == info.config
