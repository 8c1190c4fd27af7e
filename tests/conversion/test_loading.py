"""Whatever a user calls "the model" leads to the same weights."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddle_dit.checkpoint import save_checkpoint
from paddle_dit.conversion import load_model, write_pipeline
from paddle_dit.conversion.loading import class_names, read_weights
from paddle_dit.data.labels import imagenet_labels
from paddle_dit.errors import CheckpointError


@pytest.fixture
def places(tiny, tiny_vae, tmp_path):
    """Return (tensors, info, places that hold them)."""
    import paddle

    tensors, info = tiny(depth=1, label_names={3: "three"})
    save_checkpoint(tmp_path / "run", 5, info, {"model": tiny(depth=1, seed=1)[0], "ema": tensors}, {})
    write_pipeline(tensors, info, tiny_vae, tmp_path / "pipe", id2label=class_names(info))
    (tmp_path / "files").mkdir()
    info.save(tmp_path / "files" / "config.json")
    save_file(tensors, tmp_path / "files" / "weights.safetensors")
    paddle.save(tensors, str(tmp_path / "files" / "weights.pdparams"))
    names = ("run", "run/checkpoint-5", "pipe", "files/weights.safetensors", "files/weights.pdparams")
    return tensors, info, [tmp_path / name for name in names]


def test_every_place_gives_the_same_model(places):
    tensors, info, paths = places
    for path in paths:
        model, found = load_model(path)
        assert found == info
        assert not model.training
        assert all(np.array_equal(tensor.numpy(), tensors[name]) for name, tensor in model.state_dict().items())


def test_raw_weights_on_request(places, tiny):
    raw, _ = read_weights(places[2][0], "model")
    assert all(np.array_equal(raw[name], array) for name, array in tiny(depth=1, seed=1)[0].items())


def test_a_checkpoint_without_ema_says_so(places, tmp_path):
    tensors, info, _ = places
    save_checkpoint(tmp_path / "run", 6, info, {"model": tensors}, {})
    with pytest.raises(CheckpointError, match="no ema weights; ask for --weights model"):
        load_model(tmp_path / "run")


def test_class_names(tiny):
    assert class_names(tiny(label_names={3: "three"})[1]) == {3: "three"}
    assert class_names(tiny(num_classes=1000)[1]) == imagenet_labels()
    assert class_names(tiny(num_classes=2)[1]) == {0: "0", 1: "1"}
