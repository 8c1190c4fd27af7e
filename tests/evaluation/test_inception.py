"""Inception equals the golden arrays; its features are those that stored statistics are of."""

import numpy as np
import paddle
import pytest

from paddle_dit.errors import ConversionError, DataError
from paddle_dit.evaluation.inception import Inception, _folded, preprocess, resize
from paddle_dit.evaluation.inception_features import InceptionFeatures

from .inception_weights import formula_weights, golden, shapes


@pytest.fixture(scope="module")
def arrays():
    return golden()


@pytest.fixture(scope="module")
def weights():
    return formula_weights()


@pytest.fixture(scope="module")
def network(weights):
    network = Inception()
    network.load(weights)
    return network


def close(ours, reference, tolerance=1e-3):
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


def test_the_tensors_are_those_of_the_public_port(arrays):
    assert sorted(shapes()) == sorted(arrays["names"].tolist())


def test_images_are_resized_as_the_original_graph_does(arrays):
    found = resize(arrays["images"])
    assert found.shape == [2, 3, 299, 299]
    assert close(found.numpy()[:, :, ::16, ::16], arrays["resized"], 1e-5)
    np.testing.assert_allclose(preprocess(arrays["images"]).numpy(), (found.numpy() - 128) / 128, atol=1e-6)


@paddle.no_grad()
def test_every_output_equals_the_reference(arrays, network):
    found, hooks = {}, []
    for name, step in (("mixed_5d", 8), ("mixed_6e", 32)):
        layer = getattr(network, name.capitalize())

        def keep(layer, inputs, output, name=name, step=step):
            found[name] = output.numpy()[:, ::step]

        hooks.append(layer.register_forward_post_hook(keep))
    pool, spatial, logits = network(preprocess(arrays["images"]))
    for hook in hooks:
        hook.remove()
    found |= {"pool": pool.numpy(), "spatial": spatial.numpy(), "logits": (logits + network.fc.bias).numpy()}
    assert {name: close(array, arrays[name], 1e-4) for name, array in found.items()} == dict.fromkeys(found, True)


def test_a_folded_convolution_equals_a_convolution_and_its_batch_normalisation(weights):
    name, x = "Mixed_6a.branch3x3dbl_2", np.random.default_rng(0).standard_normal((2, 64, 9, 9))
    weight, bias = _folded(weights, name, [96, 64, 3, 3])
    x, bn = paddle.to_tensor(x), {part: weights[f"{name}.bn.{part}"].astype(np.float64)[:, None, None] for part in
                                  ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    plain = paddle.nn.functional.conv2d(x, paddle.to_tensor(weights[f"{name}.conv.weight"].astype(np.float64))).numpy()
    plain = (plain - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-3) * bn["weight"] + bn["bias"]
    folded = paddle.nn.functional.conv2d(x, *(paddle.to_tensor(part.astype(np.float64)) for part in (weight, bias)))
    np.testing.assert_allclose(folded.numpy(), plain, atol=1e-6)


def test_features_are_in_the_order_of_stored_statistics_and_alike_in_any_batch(arrays, weights):
    features = InceptionFeatures(weights, "a hash")
    found = features(arrays["images"])
    assert close(found.pool, arrays["pool"])
    assert close(found.logits, arrays["logits"] - weights["fc.bias"])
    assert close(found.spatial, arrays["spatial"].transpose(0, 2, 3, 1).reshape(2, -1))
    assert tuple(part.shape[1] for part in found[:2]) == features.sizes == (2048, 2023)
    alone = features(arrays["images"][1:])
    assert all(close(ours, whole[1:], 1e-5) for ours, whole in zip(alone, found, strict=True))
    assert "other weights than the public ones" in features.about["name"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"Mixed_7c.branch_pool.bn.bias": None}, "lack 'Mixed_7c.branch_pool.bn.bias'"),
        ({"fc.weight": np.zeros((1000, 2048), np.float32)}, r"\[1000, 2048\], not \[1008, 2048\]; .* not those of a"),
        ({"Conv2d_1a_3x3.bn.running_var": -np.ones(32, np.float32)}, "running_var' .* is not positive"),
    ],
)
def test_other_weights_are_refused(weights, change, told):
    tensors = {name: array for name, array in {**weights, **change}.items() if array is not None}
    with pytest.raises(ConversionError, match=told):
        Inception().load(tensors)


@pytest.mark.parametrize(
    ("shape", "told"), [((8, 8), "repeat the grey"), ((8, 8, 1), "repeat the grey"), ((8, 8, 4), r"\[8, 8, 4\]")]
)
def test_only_rgb_images_are_taken(shape, told):
    InceptionFeatures.check(None, (8, 8, 3), "x.npz")
    with pytest.raises(DataError, match=told):
        InceptionFeatures.check(None, shape, "x.npz")
