"""Several folders as one source, and some of its classes: nothing is mixed up, and what does not fit is named."""

import numpy as np
import pytest

from paddle_dit.data.loader import BatchLoader
from paddle_dit.data.mixture import ClassSubset, Mixture, name_samples, open_sources
from paddle_dit.data.order import SampleOrder
from paddle_dit.data.source import open_source
from paddle_dit.data.store import StoreWriter
from paddle_dit.data.subset import hold_out
from paddle_dit.errors import ConfigError, DataError

SHAPE = (4, 2, 2)
NAMES = {0: "ant", 1: "bee, honey bee", 2: "cat", 3: "dog"}


def write_store(folder, first=0, count=20, num_classes=4, label_names=NAMES, shape=SHAPE, flip=True, **options):
    """Sample ``n`` holds ``first + n`` everywhere, mirrored the negative, and has label ``(first + n) % 4``."""
    options = {"num_classes": num_classes, "label_names": label_names, "dtype": "float32", **options}
    numbers = first + np.arange(count)
    samples = np.broadcast_to(numbers[:, None, None, None], (count, *shape)).astype(np.float32)
    with StoreWriter(folder, sample_shape=shape, flip=flip, shard_size=7, **options) as writer:
        writer.append(samples, numbers % 4, -samples if flip else None)
    return folder


def write_pairs(folder, first, count):
    for kind in ("features", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        np.save(folder / "features" / f"{number}.npy", np.full((1, *SHAPE), first + number, np.float32))
        np.save(folder / "labels" / f"{number}.npy", np.array([(first + number) % 4]))
    return folder


@pytest.fixture
def three(tmp_path):
    return [
        write_store(tmp_path / name, first, count) for name, first, count in (("a", 0, 20), ("b", 20, 9), ("c", 29, 11))
    ]


def test_parts_follow_each_other_and_a_batch_takes_from_all(three):
    source = open_sources(three)
    indices = np.random.default_rng(0).permutation(40)
    samples, labels = source.gather(indices)
    assert (len(source), source.sample_shape, source.num_classes, source.label_names) == (40, SHAPE, 4, NAMES)
    assert (samples.dtype, samples.shape, labels.dtype) == (np.float32, (40, *SHAPE), np.int64)
    np.testing.assert_array_equal(samples[:, 0, 0, 0], indices)
    np.testing.assert_array_equal(labels, indices % 4)
    np.testing.assert_array_equal(source.labels, np.arange(40) % 4)
    flipped = indices % 3 == 0
    np.testing.assert_array_equal(source.gather(indices, flipped)[0][:, 1, 1, 1], np.where(flipped, -indices, indices))
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            source.gather(np.array([wrong]))


def test_one_folder_stays_what_it_is(three):
    alone, opened = open_sources(three[:1]), open_source(three[0])
    assert type(alone) is type(opened)
    assert alone.fingerprint == opened.fingerprint


def test_a_loader_sees_every_sample_of_a_mixture_once_an_epoch(three):
    source = open_sources(three)
    order = SampleOrder(len(source), 8, seed=3)
    with BatchLoader(source, order, num_workers=2) as loader:
        seen = np.concatenate([next(loader).latents[:, 0, 0, 0] for _ in range(order.steps_per_epoch)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(40))


def test_the_fingerprint_names_the_parts_and_their_order(three):
    prints = {
        open_sources(folders).fingerprint for folders in (three, three[::-1], three[:2], three[1:], three[:1] * 2)
    }
    assert len(prints) == 5
    assert open_sources(three).fingerprint in prints


def test_pairs_learn_their_classes_from_a_store_and_mirrored_samples_need_all_parts(tmp_path):
    store, pairs = write_store(tmp_path / "store"), write_pairs(tmp_path / "pairs", 20, 5)
    for folders in ([store, pairs], [pairs, store]):
        source = open_sources(folders)
        assert (source.num_classes, source.label_names, source.has_flip, source.labels) == (4, NAMES, False, None)
        assert [part.num_classes for part in source.parts] == [4, 4]
    np.testing.assert_array_equal(source.gather(np.array([24, 2]))[0][:, 0, 0, 0], [19, 22])
    untold = open_sources([pairs, pairs])
    assert untold.num_classes is None
    untold.num_classes = 3
    with pytest.raises(DataError, match="says class 3 of 3"):
        untold.gather(np.arange(10))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": (4, 4, 4)}, r"another shape \(\(4, 4, 4\), not \(4, 2, 2\)\)"),
        ({"num_classes": 5}, r"another number of classes \(5, not 4\)"),
        ({"kind": "moments"}, r"another kind \(moments, not latents\)"),
        ({"label_names": {**NAMES, 2: "cow"}}, r"another class names \(2: cow, not 2: cat\)"),
        ({"label_names": {0: "ant"}}, r"\(1: without a name, not 1: bee, honey bee\)"),
        ({"vae": {"scaling_factor": 0.5}}, r"another VAE's scaling factor \(0.5, not 0.25\)"),
        ({"vae": {"scaling_factor": 0.25, "image_size": 32}}, r"another image size \(32, not 16\)"),
    ],
)
def test_folders_that_do_not_fit_are_named_with_what_differs(tmp_path, change, told):
    vae = {"scaling_factor": 0.25, "image_size": 16}
    one = write_store(tmp_path / "one", vae=vae)
    write_store(tmp_path / "other", **{"vae": vae, **change})
    with pytest.raises(DataError, match=rf"other cannot be joined with .*one: .*{told}") as caught:
        open_sources([one, tmp_path / "other"])
    assert "\n" not in str(caught.value)


def test_a_part_that_does_not_fit_the_model_is_named(three, tmp_path):
    other = write_store(tmp_path / "large", shape=(4, 4, 4))
    with pytest.raises(DataError, match=r"latents in .*large are \[4, 4, 4\]"):
        open_sources([three[0], other], sample_shape=SHAPE)
    with pytest.raises(DataError, match="a has 4 classes, --num-classes says 5"):
        open_sources(three, num_classes=5)


@pytest.mark.parametrize("folders", [slice(0, 1), slice(0, 3)])
def test_chosen_classes_are_renumbered_by_their_ids_and_keep_their_names(three, folders):
    source = open_sources(three[folders], class_subset=["dog", "honey bee", "1"])
    numbers = np.array([n for n in range(len(open_sources(three[folders]))) if n % 4 in (1, 3)])
    samples, labels = source.gather(np.arange(len(source)))
    assert (source.num_classes, source.classes) == (2, (1, 3))
    assert source.label_names == {0: NAMES[1], 1: "dog"}
    np.testing.assert_array_equal(samples[:, 0, 0, 0], numbers)
    np.testing.assert_array_equal(labels, (numbers % 4 == 3).astype(np.int64))
    np.testing.assert_array_equal(source.labels, labels)
    assert source.gather(np.arange(2), np.array([True, False]))[0][:, 0, 0, 0].tolist() == [-1, 3]


def test_the_fingerprint_says_which_classes_were_chosen(three):
    prints = [open_sources(three[:1], class_subset=chosen).fingerprint for chosen in ([0, 1], [1, 0], [0, 2])]
    assert prints[0] == prints[1] != prints[2]
    assert prints[2].endswith("classes 0, 2 of 4")


def test_classes_without_names_are_chosen_by_id(tmp_path):
    source = open_sources([write_store(tmp_path / "a", label_names=None)], class_subset=["2", "0"])
    assert (source.num_classes, source.label_names) == (2, None)
    partly = open_sources([write_store(tmp_path / "b", label_names={2: "cat"})], class_subset=["cat", "3"])
    assert partly.label_names == {0: "cat"}


def test_classes_that_are_not_there_are_refused(three, tmp_path):
    with pytest.raises(ConfigError, match=r"no class is called 'dgo'. Did you mean 'dog'"):
        open_sources(three, class_subset=["dgo"])
    with pytest.raises(ConfigError, match="there is no class 4"):
        open_sources(three, class_subset=["4"])
    write_store(tmp_path / "small", count=2)
    with pytest.raises(DataError, match="small holds no samples of class 3"):
        open_sources([tmp_path / "small"], class_subset=[0, 3])
    with pytest.raises(DataError, match="leaves 2 classes, --num-classes says 4"):
        open_sources(three, class_subset=[0, 3], num_classes=4)
    pairs = write_pairs(tmp_path / "pairs", 0, 8)
    with pytest.raises(DataError, match=r"pairs holds npy pairs, .*; pack them first"):
        open_sources([three[0], pairs], class_subset=[0])


def test_samples_are_named_by_their_folder_through_every_layer(three):
    source = open_sources(three)
    assert isinstance(source, Mixture)
    assert name_samples(source, np.array([0, 28, 29])) == f"0 of {three[0]}, 8 of {three[1]}, 0 of {three[2]}"
    chosen = open_sources(three, class_subset=[1])
    assert isinstance(chosen, ClassSubset)
    assert name_samples(chosen, np.array([9])) == f"8 of {three[2]}"  # 37 is the tenth of class 1
    rest, _ = hold_out(chosen, 4)
    index = rest.indices[3]
    assert name_samples(rest, np.array([3])) == name_samples(chosen, np.array([index]))
    assert name_samples(open_source(three[1]), np.arange(10)) == "0, 1, 2, 3, 4, 5, 6, 7"
