import json

import pytest

from paddle_dit.config import PRESETS, DiTConfig, ModelInfo
from paddle_dit.errors import ConfigError

from .conftest import GOLDEN

# Multiply-adds at 256x256, in units of 1e9 (the paper's "Gflops").
MULTIPLY_ADDS = {
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06, "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71, "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64,
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_presets_have_the_papers_costs(name):
    config = DiTConfig.from_preset(name)
    assert config.num_parameters() == json.loads((GOLDEN / "param_counts.json").read_text())[name]
    assert config.multiply_adds() / 1e9 == pytest.approx(MULTIPLY_ADDS[name], rel=0.01)


def test_the_digits_preset_fits_the_digits():
    config = DiTConfig.from_preset("DiT-Digits/2")
    assert (config.sample_shape, config.num_classes) == ((4, 8, 8), 10)
    assert set(PRESETS) - set(MULTIPLY_ADDS) == {"DiT-Digits/2"}


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'DiT-XL/2'"):
        DiTConfig.from_preset("DiT-XL2")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sample_size", 31, "multiple of patch_size"),
        ("sample_size", (32, 30, 2), "one int or two"),
        ("hidden_size", 100, "multiple of num_heads"),
        ("depth", 0, "depth must be a positive int"),
        ("num_classes", -1, "num_classes"),
        ("class_dropout_prob", 1.0, "class_dropout_prob"),
        ("frequency_shift", 2, "frequency_shift"),
    ],
)
def test_impossible_values_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        DiTConfig(**{field: value})


def test_label_rows():
    assert DiTConfig(num_classes=10).label_rows == 11
    assert DiTConfig(num_classes=10, class_dropout_prob=0.0).label_rows == 10
    unconditional = DiTConfig(num_classes=0, class_dropout_prob=0.0)
    assert (unconditional.label_rows, unconditional.null_class) == (1, 0)


def test_model_info_survives_its_file(tmp_path):
    info = ModelInfo(DiTConfig(sample_size=(8, 16), num_classes=2), {0: "cat", 1: "狗"}, {"name": "vae"})
    info.save(tmp_path / "config.json")
    assert ModelInfo.load(tmp_path / "config.json") == info


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "paddle_dit", "model": {"depht": 3}}'])
def test_a_foreign_model_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"JSON|does not describe|unknown key 'depht'"):
        ModelInfo.load(tmp_path / "config.json")
