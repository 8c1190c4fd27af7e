"""npy pairs to a packed store and back: every sample arrives, interruptions leave no trace, and misfits are named."""

import itertools
import os

import numpy as np
import pytest

from paddle_dit.data.npy_pairs import NpyPairs
from paddle_dit.data.packing import Packing, read_label_names
from paddle_dit.data.source import open_source
from paddle_dit.data.store import PackedStore, StoreWriter
from paddle_dit.data.unpacking import Unpacking
from paddle_dit.data.verify import open_check
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.models.vae import find_vae

SHAPE, COUNT = (4, 2, 3), 600


def write_pairs(folder, count=COUNT, seed=0, stems=None):
    random = np.random.default_rng(seed)
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
    for number, stem in zip(range(count), stems or range(count), strict=True):
        latent = random.standard_normal((1, *SHAPE)).astype(np.float32)
        np.save(folder / "imagenet256_features" / f"{stem}.npy", latent)
        np.save(folder / "imagenet256_labels" / f"{stem}.npy", np.array([number % 5]))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "src")


def pack(source, folder, **options):
    with Packing(source, folder, **{"num_classes": 5, "shard_size": 250, **options}) as job:
        store = job.run()
        job.compare(store)
        return store


def unpack(source, folder, **options):
    with Unpacking(source, folder, **{"name": "imagenet256", **options}) as job:
        result = job.run()
        job.compare(result)
        return result


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_pair_arrives_rounded_to_the_dtype(pairs, tmp_path, dtype):
    store = pack(pairs, tmp_path, dtype=dtype, vae={"name": "a", "scaling_factor": 0.5}, label_names={0: "ant"})
    expected, labels = NpyPairs(pairs).gather(np.arange(COUNT))
    found, found_labels = store.gather(np.arange(COUNT))
    np.testing.assert_array_equal(found, expected.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(found_labels, labels)
    assert [entry["length"] for entry in store.index["shards"]] == [250, 250, 100]
    assert (store.vae, store.label_names, store.num_classes) == ({"name": "a", "scaling_factor": 0.5}, {0: "ant"}, 5)
    assert not list(open_check(tmp_path).problems())
    assert not (tmp_path / ".lock").exists()


def test_a_store_and_its_pairs_are_the_same_data(pairs, tmp_path):
    pack(pairs, tmp_path / "store", dtype="float32")
    unpack(tmp_path / "store", tmp_path / "npy")
    assert tree(tmp_path / "npy") == tree(pairs)  # to the byte, as fast-DiT writes them


def test_a_store_is_packed_anew_with_its_names_and_mirrored_samples(tmp_path):
    random = np.random.default_rng(0)
    latents = random.standard_normal((2, 40, *SHAPE)).astype(np.float32)
    options = {"sample_shape": SHAPE, "num_classes": 5, "label_names": {1: "bee"}, "vae": {"name": "a"}, "flip": True}
    with StoreWriter(tmp_path / "old", dtype="float32", source="two shelves", kind="moments", **options) as writer:
        writer.append(latents[0], np.arange(40) % 5, latents[1])
    store = pack(tmp_path / "old", tmp_path / "new", num_classes=None, shard_size=16)
    assert (store.label_names, store.vae, store.kind) == ({1: "bee"}, {"name": "a"}, "moments")
    assert (store.index["source"], store.index["dtype"], len(store.index["flip_shards"])) == (
        "two shelves",
        "float16",
        3,
    )
    for flipped in (0, 1):
        found, _ = store.gather(np.arange(40), np.full(40, bool(flipped)))
        np.testing.assert_array_equal(found, latents[flipped].astype(np.float16).astype(np.float32))
    with pytest.raises(DataError, match="old holds moments; npy pairs hold latents"):
        unpack(tmp_path / "old", tmp_path / "npy")


def test_mirrored_samples_are_left_out_of_pairs_and_that_is_said(tmp_path):
    latents = np.ones((8, *SHAPE), np.float32)
    with StoreWriter(tmp_path / "store", sample_shape=SHAPE, num_classes=5, flip=True) as writer:
        writer.append(latents, np.zeros(8, np.int64), -latents)
    said = []
    found, _ = unpack(tmp_path / "store", tmp_path / "npy", report=said.append).gather(np.arange(8))
    np.testing.assert_array_equal(found, latents)
    assert said == ["npy pairs have no mirrored samples: those of the store are left out"]


@pytest.mark.parametrize("convert", [pack, unpack])
def test_the_same_command_again_finds_all_done(pairs, tmp_path, convert):
    source = pairs
    if convert is unpack:
        source = tmp_path / "store"
        pack(pairs, source)
    convert(source, tmp_path / "result")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "result").rglob("*.npy")}
    convert(source, tmp_path / "result")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "result").rglob("*.npy")} == times


@pytest.mark.parametrize(("asked", "overridden"), [({}, False), ({"scaling_factor": 0.5}, True)])
def test_a_vae_that_is_here_says_its_image_size_and_scaling_factor(pairs, tmp_path, asked, overridden):
    own = find_vae("data/digits_vae", fingerprint=False).scaling_factor
    vae = pack(pairs, tmp_path, vae={"name": "data/digits_vae", **asked}).vae
    expected = {"name": "data/digits_vae", "image_size": 4 * SHAPE[1], "scaling_factor": 0.5 if overridden else own}
    assert vae == expected | ({"config_scaling_factor": own} if overridden else {})


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"shard_size": 100}, {"vae": {"name": "b"}}])
def test_a_store_made_with_other_settings_is_left_alone(pairs, tmp_path, change):
    pack(pairs, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(DataError, match="already holds a store; choose another folder"):
        pack(pairs, tmp_path, **change)
    assert tree(tmp_path) == before


def test_a_store_of_other_samples_with_the_same_names_is_left_alone(pairs, tmp_path):
    pack(pairs, tmp_path / "store")
    with pytest.raises(DataError, match="already holds a store"):
        pack(write_pairs(tmp_path / "src", seed=1), tmp_path / "store")


def test_pairs_made_from_something_else_are_left_alone(pairs, tmp_path):
    pack(pairs, tmp_path / "store")
    write_pairs(tmp_path / "npy", seed=1)
    with pytest.raises(DataError, match="already holds imagenet256_features; choose another folder"):
        unpack(tmp_path / "store", tmp_path / "npy")


def stopped(after):
    """Return a progress that stops the work once so many samples are done."""
    done = itertools.count(256, 256)

    def advance(amount):
        if next(done) > after:
            raise KeyboardInterrupt

    return advance


def test_packing_that_was_stopped_goes_on_after_its_last_whole_shard(pairs, tmp_path):
    with Packing(pairs, tmp_path, num_classes=5, shard_size=250) as job, pytest.raises(KeyboardInterrupt):
        job.run(stopped(after=256))
    with pytest.raises(DataError, match="half written"):
        open_source(tmp_path)
    with Packing(pairs, tmp_path, num_classes=5, shard_size=250) as job:
        assert job.done == 250
        advanced = []
        job.run(advanced.append)
        assert job.done + sum(advanced) == job.total == COUNT
    pack(pairs, tmp_path / "whole")
    assert {name: tree(tmp_path)[name] for name in tree(tmp_path / "whole")} == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(tree(tmp_path / "whole"))


def test_packing_something_else_into_a_half_written_folder_is_refused(pairs, tmp_path):
    with Packing(pairs, tmp_path / "store", num_classes=5, shard_size=250) as job, pytest.raises(KeyboardInterrupt):
        job.run(stopped(after=256))
    with pytest.raises(DataError, match=r"half written with other settings \(.*source_samples was"):
        pack(write_pairs(tmp_path / "src", seed=1), tmp_path / "store")


def test_pairs_that_were_stopped_are_no_pairs_and_are_mended(pairs, tmp_path):
    pack(pairs, tmp_path / "store")
    folder = tmp_path / "npy"
    with Unpacking(tmp_path / "store", folder, "imagenet256") as job, pytest.raises(KeyboardInterrupt):
        job.run(stopped(after=256))
    with pytest.raises(DataError, match="half written"):
        open_source(folder)
    (folder / "imagenet256_features.partial" / "7.npy").write_bytes(b"half")
    with pytest.raises(DataError, match=r"half written with other settings \(dtype was 'float32', now 'float16'\)"):
        unpack(tmp_path / "store", folder, dtype="float16")
    unpack(tmp_path / "store", folder)
    unpack(tmp_path / "store", tmp_path / "whole")
    assert tree(folder) == tree(tmp_path / "whole")


def test_pairs_of_which_only_one_folder_was_renamed_are_finished(pairs, tmp_path, monkeypatch):
    pack(pairs, tmp_path / "store")
    folder, sync = tmp_path / "npy", os.sync
    monkeypatch.setattr(os, "sync", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "store", folder)
    (folder / "imagenet256_features.partial").rename(folder / "imagenet256_features")
    monkeypatch.setattr(os, "sync", sync)
    unpack(tmp_path / "store", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["imagenet256_features", "imagenet256_labels"]


def test_a_value_beyond_float16_is_refused_and_its_file_named(tmp_path):
    source = write_pairs(tmp_path / "src", 300, stems=range(1000, 1300))
    path = source / "imagenet256_features" / "1270.npy"
    latent = np.load(path)
    latent[0, 1, 1, 1] = -65_520  # the first that rounds to infinity
    np.save(path, latent)
    with pytest.raises(DataError, match=r"features/1270.npy \(sample 270\) holds 65520, which float16 cannot"):
        pack(source, tmp_path / "store", shard_size=300)
    store = pack(source, tmp_path / "store", dtype="float32")  # no shard was finished yet: another plan may begin
    assert store.gather(np.array([270]))[0].min() == -65_520
    with pytest.raises(DataError, match="sample 270 holds more than float16 can"):
        unpack(tmp_path / "store", tmp_path / "npy", dtype="float16")


def test_comparing_finds_any_sample_or_label_that_differs(pairs, tmp_path):
    with Packing(pairs, tmp_path, num_classes=5, shard_size=250) as job:
        store = job.run()
        shard = np.load(tmp_path / "latents-00001.npy", mmap_mode="r+")
        good = shard[37].copy()
        shard[37, 0, 0, 0] = np.nextafter(good[0, 0, 0], np.float16(9))
        shard.flush()
        with pytest.raises(DataError, match="sample 287 differs from its source"):
            job.compare(store)
        shard[37] = good
        shard.flush()
        store.labels[599] = (store.labels[599] + 1) % 5
        with pytest.raises(DataError, match="sample 599 differs from its source"):
            job.compare(store)


@pytest.mark.parametrize("convert", [pack, unpack])
def test_a_store_that_has_changed_is_neither_packed_anew_nor_unpacked(pairs, tmp_path, convert):
    pack(pairs, tmp_path / "store", dtype="float32")
    shard = np.load(tmp_path / "store" / "latents-00001.npy", mmap_mode="r+")
    shard[37] += 1
    shard.flush()
    with pytest.raises(DataError, match=r"latents-00001\.npy has changed: its sha256 is not that in index\.json; copy"):
        convert(tmp_path / "store", tmp_path / "result")
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["plan.json"]


def test_a_source_whose_name_is_no_unicode_is_packed(tmp_path):
    source = write_pairs(tmp_path / os.fsdecode(b"caf\xe9"), 3)
    assert pack(source, tmp_path / "store").index["source"] == r"npy pairs caf\xe9"
    with pytest.raises(DataError, match=r"is no text in Unicode; give it another name"):
        unpack(tmp_path / "store", tmp_path / "npy", name=os.fsdecode(b"na\xefve"))


def test_pairs_must_be_told_their_classes(pairs, tmp_path):
    with pytest.raises(DataError, match="do not say how many classes there are; give --num-classes"):
        pack(pairs, tmp_path, num_classes=None)
    with pytest.raises(DataError, match=r"\(sample \d+\) says class [34] of 3"):
        pack(pairs, tmp_path, num_classes=3)
    names = dict(enumerate(["ant", "bee", "cat", "dog", "elk"]))
    store = pack(pairs, tmp_path, num_classes=None, label_names=names)
    assert (store.num_classes, store.label_names) == (5, names)


def test_a_folder_is_packed_by_one_at_a_time_and_never_onto_itself(pairs, tmp_path):
    with Packing(pairs, tmp_path, num_classes=5), pytest.raises(ConfigError, match="is in use by process"):
        pack(pairs, tmp_path)
    with pytest.raises(DataError, match="is the source itself"):
        pack(pairs, pairs)
    with pytest.raises(DataError, match="is the source itself"):
        unpack(PackedStore(pack(pairs, tmp_path).folder).folder, tmp_path)


def test_a_refused_folder_keeps_no_lock(pairs, tmp_path):
    (tmp_path / "labels.npy").write_bytes(b"mine")
    with pytest.raises(DataError, match="half written by another command or version"):
        pack(pairs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.npy"]


def test_a_full_disk_leaves_no_half_written_pair_and_the_same_command_goes_on(pairs, tmp_path, monkeypatch):
    pack(pairs, tmp_path / "store")
    monkeypatch.setattr(os, "sync", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left on device; free some space, then run the same command again"):
        unpack(tmp_path / "store", tmp_path / "npy")
    monkeypatch.undo()
    unpack(tmp_path / "store", tmp_path / "npy")


def test_class_names_come_from_a_file_or_imagenet(tmp_path):
    (tmp_path / "names.json").write_text('{"0": "ant", "7": "bee"}')
    assert read_label_names(str(tmp_path / "names.json")) == {0: "ant", 7: "bee"}
    assert read_label_names("imagenet")[1].startswith("goldfish")
    assert read_label_names(None) is None
    for text in ("{}", '{"0": "ant", "00": "bee"}', '{"a": "ant"}', '{"1": 2}', "[]", "{"):
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(DataError, match=r"names\.json"):
            read_label_names(str(tmp_path / "names.json"))
