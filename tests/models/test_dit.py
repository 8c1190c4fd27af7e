import contextlib
import dataclasses
import json

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.models.dit import DiT

from ..conftest import GOLDEN


def forward(model, batch=2):
    paddle.seed(0)
    config = model.config
    labels = paddle.full([batch], config.null_class, dtype="int64")
    return model(paddle.randn([batch, *config.sample_shape]), paddle.arange(batch), labels)


def randomized(config, **options):
    """Return a model whose every weight is random, also those that start at zero."""
    paddle.seed(1)
    model = DiT(config, **options)
    for parameter in model.parameters():
        parameter.set_value(0.1 * paddle.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-S/2", "DiT-Digits/2"])
def test_a_built_model_has_the_counted_parameters(name):
    config = DiTConfig.from_preset(name)
    model = DiT(config)
    built = sum(parameter.size for parameter in model.parameters()) + model.pos_embed.size
    assert built == config.num_parameters()
    if name != "DiT-Digits/2":
        assert built == json.loads((GOLDEN / "param_counts.json").read_text())[name]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"learn_sigma": False},
        {"sample_size": (8, 12)},
        {"num_classes": 0},
        {"patch_size": 4, "in_channels": 3},
        {"frequency_shift": 0},
    ],
)
def test_output_shape(tiny_config, change):
    config = dataclasses.replace(tiny_config, **change)
    out = forward(randomized(config))
    assert out.shape == [2, config.out_channels, *config.height_width]
    assert out.dtype == paddle.float32
    assert float(out.std()) > 0


def test_initialisation_is_the_papers(tiny_config):
    model = DiT(tiny_config)
    weights = {name: value.numpy() for name, value in model.named_parameters()}
    zero = [name for name, value in weights.items() if not value.any()]
    biases = [name for name in weights if name.endswith("bias")]
    modulation = [name for name in weights if "adaLN_modulation" in name]
    assert set(zero) == {*biases, *modulation, "final_layer.linear.weight"}
    assert weights["y_embedder.embedding_table.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert weights["t_embedder.mlp.0.weight"].std() == pytest.approx(0.02, rel=0.1)
    bound = np.sqrt(6 / (48 + 192))
    assert bound * 0.95 < np.abs(weights["blocks.0.mlp.fc1.weight"]).max() <= bound
    assert not forward(model).any()


def test_unpatchify_undoes_patches(tiny_config):
    config = dataclasses.replace(tiny_config, sample_size=(4, 6), learn_sigma=False)
    model = DiT(config)
    x = paddle.arange(4 * 4 * 6, dtype="float32").reshape([1, 4, 4, 6])
    patches = x.reshape([1, 4, 2, 2, 3, 2]).transpose([0, 2, 4, 3, 5, 1]).reshape([1, 6, 16])
    assert (model.unpatchify(patches) == x).all()


def test_rows_and_columns_are_not_confused(tiny_config):
    config = dataclasses.replace(tiny_config, sample_size=(4, 8))
    table = DiT(config).pos_embed.reshape([2, 4, 48])
    assert (table[0, 1, 24:] == table[0, 2, 24:]).all()  # the second half encodes the row
    assert (table[0, 1, :24] == table[1, 1, :24]).all()  # the first half the column
    assert not (table[0, 1] == table[1, 1]).all()


@pytest.mark.parametrize("every", [1, 2])
def test_recomputation_changes_nothing(tiny_config, every):
    gradients = []
    for recompute in (0, every):
        model = randomized(tiny_config, recompute_every=recompute)
        forward(model).square().mean().backward()
        gradients.append({name: parameter.grad.numpy() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, atol=1e-6, err_msg=name)


def test_sinusoids_stay_float32_in_a_half_precision_model(tiny_config):
    embedder, seen = randomized(tiny_config).t_embedder, []
    embedder.mlp.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    embedder(paddle.arange(1000))
    embedder.to(dtype="float16")
    with contextlib.suppress(RuntimeError):  # the CPU has no half-precision matmul; the sinusoids come before it
        embedder(paddle.arange(1000))
    assert seen[1].dtype == paddle.float16
    assert (seen[1] == seen[0].astype("float16")).all()


def test_frequency_shift_moves_the_output(tiny_config):
    outputs = []
    for shift in (0, 1):
        model = randomized(dataclasses.replace(tiny_config, frequency_shift=shift))
        outputs.append(model(paddle.ones([1, 4, 8, 8]), paddle.to_tensor([500]), paddle.to_tensor([3])))
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3


def test_latents_of_another_shape_are_refused(tiny_config):
    model = DiT(dataclasses.replace(tiny_config, sample_size=(8, 4)))
    for shape in ([1, 4, 4, 8], [1, 4, 8, 8], [1, 3, 8, 4]):
        with pytest.raises(ValueError, match="this model takes"):
            model(paddle.zeros(shape), paddle.zeros([1]), paddle.zeros([1], dtype="int64"))
