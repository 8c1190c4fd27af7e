"""A trained model's arrays for other patches, outputs and classes, against what the model then computes."""

import dataclasses

import numpy as np
import paddle
import pytest
from PIL import Image

from paddle_dit.checkpoint import load_weights
from paddle_dit.config import PRESETS, DiTConfig
from paddle_dit.models.dit import DiT
from paddle_dit.models.refit import (
    LABELS,
    fresh_labels,
    match_classes,
    parameter_shapes,
    relabelled,
    resample_patches,
    resize_matrix,
    with_variance,
    without_variance,
)

CONFIG = DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=1, num_heads=3, num_classes=4)


def weights(config, seed=0):
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in parameter_shapes(config).items()}


def output(config, tensors, latents, labels=(0, 3)):
    model = DiT(config)
    load_weights(model, tensors, "these weights")
    model.eval()
    with paddle.no_grad():
        return model(paddle.to_tensor(latents), paddle.to_tensor([3, 900]), paddle.to_tensor(labels)).numpy()


@pytest.fixture
def latents():
    return np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"class_dropout_prob": 0.0}, {"learn_sigma": False}])
def test_shapes_are_those_of_the_model(changes):
    config = dataclasses.replace(CONFIG, **changes, mlp_ratio=3.5, in_channels=3)
    built = {name: tuple(weight.shape) for name, weight in DiT(config).named_parameters()}
    assert parameter_shapes(config) == built
    assert list(parameter_shapes(config)) == list(built)


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_come_to_every_presets_number_of_parameters(name):
    config = DiTConfig.from_preset(name)
    table = int(np.prod(config.grid)) * config.hidden_size
    assert sum(int(np.prod(shape)) for shape in parameter_shapes(config).values()) + table == config.num_parameters()


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (2, 8), (3, 2), (2, 2)])
def test_resizing_is_pillows_bilinear(old, new):
    patch = np.random.default_rng(0).standard_normal((old, old)).astype(np.float32)
    expected = np.asarray(Image.fromarray(patch).resize((new, new), Image.Resampling.BILINEAR))
    resized = (resize_matrix(old, new) @ patch.reshape(-1)).reshape(new, new)
    np.testing.assert_allclose(resized, expected, atol=1e-6)


def test_where_patches_grow_a_resized_patch_gives_the_same_token_and_the_resized_output():
    old, grown = CONFIG, dataclasses.replace(CONFIG, patch_size=4, sample_size=16)
    tensors = weights(old)
    resampled = resample_patches(tensors, old, 4)
    assert {name: array.shape for name, array in resampled.items()} == parameter_shapes(grown)
    matrix, random = resize_matrix(2, 4), np.random.default_rng(0)
    patch = random.standard_normal((4, 4))  # C, p * p
    token = patch.reshape(-1) @ tensors["x_embedder.proj.weight"]
    np.testing.assert_allclose((patch @ matrix.T).reshape(-1) @ resampled["x_embedder.proj.weight"], token, atol=1e-6)
    state = random.standard_normal(48)

    def drawn(arrays):
        out = state @ arrays["final_layer.linear.weight"] + arrays["final_layer.linear.bias"]
        return out.reshape(-1, 8)  # p * p, 2 C

    np.testing.assert_allclose(drawn(resampled), matrix @ drawn(tensors), atol=1e-6)
    same = set(tensors) - {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert all(resampled[name] is tensors[name] for name in same)


def test_a_smaller_patch_is_resampled_too():
    config = dataclasses.replace(CONFIG, patch_size=4)
    shapes = {name: array.shape for name, array in resample_patches(weights(config), config, 2).items()}
    assert shapes == parameter_shapes(dataclasses.replace(config, patch_size=2))


def test_there_and_back_between_patch_sizes_is_the_same():
    tensors = weights(CONFIG)
    grown = resample_patches(tensors, CONFIG, 4)
    for name in ("x_embedder.proj.weight", "final_layer.linear.weight"):
        assert np.abs(grown[name]).max() > 0.01
    same = resample_patches(tensors, CONFIG, 2)
    for name, array in tensors.items():
        np.testing.assert_allclose(same[name], array, atol=1e-6, err_msg=name)


def test_variance_comes_as_zeros_and_goes_without_a_trace(latents):
    alone = dataclasses.replace(CONFIG, learn_sigma=False)
    tensors = weights(alone)
    added = with_variance(tensors, alone)
    noise, variance = np.split(output(CONFIG, added, latents), 2, axis=1)
    np.testing.assert_allclose(noise, output(alone, tensors, latents), atol=1e-6)
    np.testing.assert_array_equal(variance, 0)
    both = weights(CONFIG, seed=2)
    left = output(alone, without_variance(both, CONFIG), latents)
    np.testing.assert_allclose(left, output(CONFIG, both, latents)[:, :4], atol=1e-6)


def test_kept_classes_and_the_null_class_draw_as_before_and_new_ones_as_without_a_class(latents):
    new = dataclasses.replace(CONFIG, num_classes=6)
    tensors = weights(CONFIG)
    table = relabelled(tensors, CONFIG, new, {0: 3, 5: 1})
    before = {label: output(CONFIG, tensors, latents, (label, label)) for label in range(5)}
    for label, former in ((0, 3), (5, 1), (6, 4), (1, 4), (4, 4)):  # 6 and 4 are the null classes
        np.testing.assert_array_equal(output(new, table, latents, (label, label)), before[former])


def test_a_null_row_that_was_not_there_is_the_mean_of_the_rows():
    old = dataclasses.replace(CONFIG, class_dropout_prob=0.0)
    tensors = weights(old)
    rows = relabelled(tensors, old, CONFIG, {0: 0})[LABELS]
    np.testing.assert_array_equal(rows[0], tensors[LABELS][0])
    np.testing.assert_allclose(rows[1:], np.tile(tensors[LABELS].mean(0), (4, 1)), atol=1e-6)


def test_a_null_row_that_is_not_wanted_is_left_out():
    new = dataclasses.replace(CONFIG, class_dropout_prob=0.0)
    tensors = weights(CONFIG)
    rows = relabelled(tensors, CONFIG, new, {label: label for label in range(4)})[LABELS]
    np.testing.assert_array_equal(rows, tensors[LABELS][:4])


def test_an_unconditional_model_gets_classes_and_loses_them():
    none = dataclasses.replace(CONFIG, num_classes=0)
    tensors = weights(none)
    rows = relabelled(tensors, none, CONFIG, {})[LABELS]
    np.testing.assert_array_equal(rows, np.repeat(tensors[LABELS], 5, axis=0))
    tensors = weights(CONFIG)
    np.testing.assert_array_equal(relabelled(tensors, CONFIG, none, {})[LABELS], tensors[LABELS][4:])


def test_fresh_rows_leave_the_null_row():
    tensors = weights(CONFIG)
    rows = fresh_labels(tensors, CONFIG, np.random.default_rng(5))[LABELS]
    np.testing.assert_array_equal(rows[4], tensors[LABELS][4])
    assert (rows[:4] != tensors[LABELS][:4]).all()
    assert 0.015 < rows[:4].std() < 0.025


@pytest.mark.parametrize(
    ("new", "old", "kept"),
    [
        ({0: "tench", 1: "Goldfish"}, {7: "goldfish", 8: "tench"}, {0: 8, 1: 7}),
        ({0: "tinca  tinca"}, {3: "tench, Tinca tinca"}, {0: 3}),
        ({0: "tench, Tinca tinca"}, {3: "tench", 4: "tinca"}, {0: 3}),
        ({0: "crane"}, {134: "crane", 517: "crane"}, {}),
        ({134: "crane", 517: "crane"}, {134: "crane", 517: "crane"}, {134: 134, 517: 517}),
        ({0: "cardigan"}, {1: "Cardigan, Cardigan Welsh corgi", 2: "cardigan"}, {0: 2}),
        ({0: "7"}, {7: "seven"}, {}),
        ({0: "", 1: "b,"}, {0: "", 1: ",b"}, {1: 1}),
    ],
)
def test_classes_of_the_same_name_find_each_other(new, old, kept):
    assert match_classes(new, old) == kept


def test_all_of_imagenet_finds_itself():
    from paddle_dit.data.labels import imagenet_labels

    names = imagenet_labels()
    assert match_classes(names, names) == {label: label for label in names}
