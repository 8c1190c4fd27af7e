"""A folder is recognised by what it holds, and compared with what the model takes."""

import numpy as np
import pytest

from paddle_dit.data.npy_pairs import NpyPairs
from paddle_dit.data.source import open_source
from paddle_dit.data.store import PackedStore, StoreWriter
from paddle_dit.errors import DataError


def write_store(folder, sample_shape=(4, 32, 32), vae=None, kind="latents"):
    with StoreWriter(folder, sample_shape=sample_shape, num_classes=10, vae=vae, kind=kind) as writer:
        writer.append(np.zeros((3, *sample_shape), np.float32), np.array([0, 9, 4]))


def write_pairs(folder):
    for name, array in {"features": np.zeros((1, 4, 32, 32), np.float32), "labels": np.array([7])}.items():
        (folder / name).mkdir()
        np.save(folder / name / "0.npy", array)


def test_both_layouts_give_the_same_interface(tmp_path):
    for folder in ("packed", "pairs"):
        (tmp_path / folder).mkdir()
    write_store(tmp_path / "packed")
    write_pairs(tmp_path / "pairs")
    packed = open_source(tmp_path / "packed", sample_shape=(4, 32, 32))
    pairs = open_source(str(tmp_path / "pairs"), num_classes=8, sample_shape=(4, 32, 32))
    assert isinstance(packed, PackedStore)
    assert isinstance(pairs, NpyPairs)
    for source, labels, num_classes in ((packed, [0], 10), (pairs, [7], 8)):
        latents, found = source.gather(np.array([0]))
        assert latents.shape == (1, 4, 32, 32)
        assert (latents.dtype, found.dtype, found.tolist()) == (np.float32, np.int64, labels)
        assert (source.kind, source.num_classes, source.label_names) == ("latents", num_classes, None)


def test_pairs_do_not_know_their_classes_until_told(tmp_path):
    write_pairs(tmp_path)
    assert open_source(tmp_path).num_classes is None
    with pytest.raises(DataError, match="class 7 of 7"):
        open_source(tmp_path, num_classes=7)


def test_contradicting_classes_are_refused(tmp_path):
    write_store(tmp_path)
    assert open_source(tmp_path, num_classes=10).num_classes == 10
    with pytest.raises(DataError, match="has 10 classes, --num-classes says 5; use --num-classes 10"):
        open_source(tmp_path, num_classes=5)


@pytest.mark.parametrize(
    ("stored", "vae", "kind", "wanted", "message"),
    [
        (
            (4, 32, 32),
            None,
            "latents",
            (4, 8, 8),
            r"latents in .* are \[4, 32, 32\] .* takes \[4, 8, 8\]; use --image-size 256",
        ),
        ((4, 16, 16), {"image_size": 64}, "latents", (4, 8, 8), "use --image-size 64 or"),
        ((16, 8, 8), None, "latents", (4, 8, 8), "use another store"),
        ((8, 8, 8), None, "moments", (8, 8, 8), r"latents drawn from the moments in .* are \[4, 8, 8\] but the model"),
    ],
)
def test_latents_that_do_not_fit_the_model_are_refused(tmp_path, stored, vae, kind, wanted, message):
    write_store(tmp_path, stored, vae, kind)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, sample_shape=wanted)


def test_anything_else_is_answered_with_what_was_expected_and_found(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected index.json .* or \*_features/ with \*_labels/, found photo.png"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        open_source(tmp_path / "photo.png")


def test_a_half_written_store_says_so(tmp_path):
    write_store(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"found labels.npy, latents-00000.npy; make the store again"):
        open_source(tmp_path)
