"""The packed store: what is written is read back, and no damage goes unnoticed."""

import json

import numpy as np
import pytest

from paddle_dit.data.npy import non_finite_rows
from paddle_dit.data.store import PackedStore, StoreWriter
from paddle_dit.data.verify import StoreCheck
from paddle_dit.errors import DataError
from paddle_dit.files import describe

SHAPE = (4, 2, 3)


def random_samples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *SHAPE)).astype(np.float32), rng.integers(0, 5, count)


def write_store(folder, count=23, shard_size=8, batch=5, **options):
    samples, labels = random_samples(count)
    with StoreWriter(folder, sample_shape=SHAPE, num_classes=5, shard_size=shard_size, **options) as writer:
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            flipped = samples[part, ..., ::-1] if options.get("flip") else None
            writer.append(samples[part], labels[part], flipped)
    return samples, labels


def edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shard_size", [1, 8, 23, 100])
def test_round_trip_in_any_order(tmp_path, dtype, shard_size):
    samples, labels = write_store(tmp_path, shard_size=shard_size, dtype=dtype)
    store = PackedStore(tmp_path)
    indices = np.random.default_rng(1).permutation(23)[:17]
    latents, found = store.gather(indices)
    assert (len(store), store.sample_shape, store.num_classes) == (23, SHAPE, 5)
    assert latents.dtype == np.float32
    assert found.dtype == np.int64
    np.testing.assert_array_equal(latents, samples.astype(dtype).astype(np.float32)[indices])
    np.testing.assert_array_equal(found, labels[indices])
    np.testing.assert_array_equal(store.labels, labels)


def test_index_describes_the_store(tmp_path):
    vae = {"name": "a vae", "scaling_factor": 0.18215, "image_size": 16}
    write_store(tmp_path, label_names={0: "cat", 3: "dog"}, vae=vae, source="two shelves")
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["scaled"] is True
    assert index["source"] == "two shelves"
    assert [shard["length"] for shard in index["shards"]] == [8, 8, 7]
    store = PackedStore(tmp_path)
    assert store.label_names == {0: "cat", 3: "dog"}
    assert store.vae == vae
    assert np.load(tmp_path / index["shards"][2]["file"]).shape == (7, *SHAPE)


def test_mirrored_samples_are_chosen_per_sample(tmp_path):
    samples, _ = write_store(tmp_path, flip=True, dtype="float32")
    indices, flipped = np.array([20, 3, 20, 9]), np.array([True, False, False, True])
    latents, _ = PackedStore(tmp_path).gather(indices, flipped)
    expected = np.where(flipped[:, None, None, None], samples[indices, ..., ::-1], samples[indices])
    np.testing.assert_array_equal(latents, expected)


def test_mirrored_samples_must_exist(tmp_path):
    write_store(tmp_path)
    with pytest.raises(ValueError, match="no mirrored"):
        PackedStore(tmp_path).gather(np.array([1]), np.array([True]))


def test_moments_are_stored_unscaled_under_their_own_name(tmp_path):
    samples, _ = write_store(tmp_path, kind="moments", dtype="float32")
    store = PackedStore(tmp_path)
    assert (store.kind, store.index["scaled"]) == ("moments", False)
    assert (tmp_path / "moments-00000.npy").is_file()
    np.testing.assert_array_equal(store.gather(np.array([22]))[0], samples[22:])


def test_the_same_samples_give_the_same_bytes_however_they_arrive(tmp_path):
    write_store(tmp_path / "a", batch=5)
    write_store(tmp_path / "b", batch=23)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["index.json", "labels.npy", *(f"latents-0000{i}.npy" for i in range(3))]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_an_interrupted_store_is_not_a_store_and_can_be_written_anew(tmp_path):
    def interrupted():
        with StoreWriter(tmp_path, sample_shape=SHAPE, num_classes=5, shard_size=4) as writer:
            writer.append(*random_samples(20))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "latents-00004.npy").is_file()
    with pytest.raises(DataError, match="half written"):
        PackedStore(tmp_path)
    write_store(tmp_path, count=5)
    assert len(PackedStore(tmp_path)) == 5
    assert not list(StoreCheck(tmp_path).problems())
    assert not (tmp_path / "latents-00001.npy").exists()


def test_a_store_is_overwritten_only_on_request(tmp_path):
    write_store(tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(DataError, match="already holds a store"):
        write_store(tmp_path, count=2)
    assert not list(StoreCheck(tmp_path).problems())
    write_store(tmp_path, count=2, overwrite=True)
    assert len(PackedStore(tmp_path)) == 2
    assert not list(StoreCheck(tmp_path).problems())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        "labels.npy",
        "latents-00000.npy",
        "note.txt",
    ]


@pytest.mark.parametrize(
    ("sample", "label", "message"),
    [
        (np.nan, 0, "sample 2 is not finite"),
        (70_000.0, 0, "not finite in float16"),
        (0.0, 5, r"label 5, outside \[0, 5\)"),
    ],
)
def test_writer_refuses_what_could_not_be_trained_on(tmp_path, sample, label, message):
    samples, labels = random_samples(3)
    samples[2, 0, 0, 0], labels[2] = sample, label
    writer = StoreWriter(tmp_path, sample_shape=SHAPE, num_classes=5)
    with pytest.raises(DataError, match=message):
        writer.append(samples, labels)


def test_writer_refuses_an_empty_store_and_unknown_classes(tmp_path):
    with pytest.raises(DataError, match="no sample"), StoreWriter(tmp_path, sample_shape=SHAPE, num_classes=5):
        pass
    with pytest.raises(DataError, match="label_names"):
        StoreWriter(tmp_path, sample_shape=SHAPE, num_classes=5, label_names={5: "sixth"})


NO_UNICODE = "caf\udce9"  # what Python makes of a file's name in Latin-1


@pytest.mark.parametrize(
    "where", [{"source": NO_UNICODE}, {"label_names": {1: NO_UNICODE}}, {"vae": {"name": NO_UNICODE}}]
)
def test_a_name_that_is_no_unicode_is_refused_before_anything_is_written(tmp_path, where):
    with pytest.raises(DataError, match=r"udce9.* is no text in Unicode; give it another name") as error:
        write_store(tmp_path / "store", **where)
    assert str(error.value).isascii()
    assert not (tmp_path / "store").exists()


def test_an_index_with_a_name_that_is_no_unicode_is_refused(tmp_path):
    write_store(tmp_path)
    edit_index(tmp_path, source=NO_UNICODE)  # escaped, it is valid JSON
    with pytest.raises(DataError, match=r"index\.json cannot be read \(.*udce9.* is no text"):
        PackedStore(tmp_path)


@pytest.mark.parametrize("name", ["latents-00001.npy", "latents_flip-00002.npy", "labels.npy"])
def test_a_file_of_another_run_is_noticed_at_opening(tmp_path, name):
    write_store(tmp_path / "one", flip=True)
    with StoreWriter(tmp_path / "other", sample_shape=SHAPE, num_classes=5, shard_size=8, flip=True) as writer:
        samples, labels = random_samples(23, seed=1)
        writer.append(samples, labels, -samples)
    (tmp_path / "other" / name).replace(tmp_path / "one" / name)
    with pytest.raises(
        DataError, match=rf"{name} is not the file that index\.json describes: of another run, or changed"
    ):
        PackedStore(tmp_path / "one")


def test_a_store_whose_index_does_not_know_the_first_samples_is_read(tmp_path):
    """As stores of former versions do not."""
    samples, _ = write_store(tmp_path, dtype="float32")
    entries = json.loads((tmp_path / "index.json").read_text())["shards"]
    edit_index(
        tmp_path, shards=[{key: entry[key] for key in ("file", "length", "bytes", "sha256")} for entry in entries]
    )
    np.testing.assert_array_equal(PackedStore(tmp_path).gather(np.arange(23))[0], samples)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left on device; free some space"):
        write_store(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("index", [23, -1])
def test_gather_refuses_indices_out_of_range(tmp_path, index):
    write_store(tmp_path)
    with pytest.raises(IndexError):
        PackedStore(tmp_path).gather(np.array([0, index]))


@pytest.mark.parametrize("name", ["latents-00001.npy", "labels.npy"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "longer"])
def test_opening_names_the_damaged_file(tmp_path, name, damage):
    write_store(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[:-1], "empty": b"", "longer": content + b"\0"}[damage])
    with pytest.raises(DataError, match=rf"{name} .*; copy or make the store again"):
        PackedStore(tmp_path)


def test_a_broken_header_of_the_right_size_is_refused(tmp_path):
    write_store(tmp_path)
    path = tmp_path / "latents-00000.npy"
    content = bytearray(path.read_bytes())
    content[12:40] = b"(" * 28
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"latents-00000.npy is not a readable plain \.npy"):
        PackedStore(tmp_path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, 116, "2 bytes more than its header says"),  # two bytes less of header: all values would be shifted
        (21, ord(">"), r">f2 \[8, 4, 2, 3\], expected float16 \[8, 4, 2, 3\]"),
    ],
)
def test_a_header_with_one_changed_byte_is_refused(tmp_path, offset, value, message):
    write_store(tmp_path)
    content = bytearray((tmp_path / "latents-00000.npy").read_bytes())
    assert (content[8], content[21:24]) == (118, b"<f2")
    content[offset] = value
    (tmp_path / "latents-00000.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"latents-00000.npy is .*{message}"):
        PackedStore(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(22, np.int64), r"labels.npy is int64 \[22\], expected int64 \[23\]"),
        (np.zeros((23, 1), np.int64), r"labels.npy is int64 \[23, 1\], expected int64 \[23\]"),
        (np.zeros(23, np.int32), r"labels.npy is int32 \[23\], expected int64 \[23\]"),
        (np.where(np.arange(23) == 7, 5, 0), r"labels.npy: sample 7 has label 5, outside \[0, 5\)"),
        (np.where(np.arange(23) == 9, -1, 0), r"labels.npy: sample 9 has label -1, outside \[0, 5\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_even_if_the_index_owns_them(tmp_path, labels, message):
    write_store(tmp_path)
    np.save(tmp_path / "labels.npy", labels)
    edit_index(tmp_path, labels={"file": "labels.npy", **describe(tmp_path / "labels.npy")})
    with pytest.raises(DataError, match=message):
        PackedStore(tmp_path)


def test_a_shard_in_fortrans_order_is_refused(tmp_path):
    write_store(tmp_path, shard_size=23)
    path = tmp_path / "latents-00000.npy"
    np.save(path, np.asfortranarray(np.load(path)))
    edit_index(tmp_path, shards=[{"file": path.name, "length": 23, **describe(path)}])
    with pytest.raises(DataError, match=r"latents-00000.npy is float16 .* in Fortran's order, expected float16"):
        PackedStore(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "use the version that wrote it"),
        ({"num_samples": 22}, "'num_samples'"),
        ({"num_samples": "23"}, "'num_samples'"),
        ({"sample_shape": [4, 2]}, "'sample_shape'"),
        ({"sample_shape": [4, 3, 2]}, r"latents-00000.npy is float16 \[8, 4, 2, 3\]"),
        ({"dtype": "float32"}, "latents-00000.npy is float16"),
        ({"dtype": "object"}, "'dtype'"),
        ({"kind": "pictures"}, "'kind'"),
        ({"num_classes": 4}, r"labels.npy: sample \d+ has label 4, outside \[0, 4\)"),
        ({"label_names": {"7": "x"}}, "'label_names'"),
        ({"has_flip": True}, "'flip_shards'"),
        ({"shards": []}, "'num_samples'"),
        ({"shards": [{"file": "latents-00000.npy"}]}, "'bytes'"),
        ({"shards": [3]}, "not an index"),
        ({"labels": None}, "'labels'"),
        ({"skipped": [1]}, "'skipped'"),
        ({"extraction": []}, "'extraction'"),
        ({"labels": {"file": "../labels.npy", "bytes": 1, "sha256": ""}}, "'file'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, changes, message):
    write_store(tmp_path)
    labels = np.load(tmp_path / "labels.npy")
    assert labels.max() == 4  # else the case of too few classes proves nothing
    edit_index(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        PackedStore(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_an_unreadable_index_is_refused(tmp_path, text):
    write_store(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index.json"):
        PackedStore(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_gather_stops_at_a_value_that_is_not_finite(tmp_path, value):
    write_store(tmp_path)
    shard = np.load(tmp_path / "latents-00001.npy", mmap_mode="r+")
    shard[3, 1, 1, 1] = value
    shard.flush()
    store = PackedStore(tmp_path)
    store.gather(np.array([10, 12]))
    with pytest.raises(DataError, match=r"sample 11 in .*latents-00001.npy holds NaN or infinity"):
        store.gather(np.array([2, 11, 12]))


def test_gather_stops_at_a_mirrored_value_that_is_not_finite(tmp_path):
    write_store(tmp_path, flip=True)
    np.load(tmp_path / "latents_flip-00001.npy", mmap_mode="r+")[3, 1, 1, 1] = np.inf
    store = PackedStore(tmp_path)
    store.gather(np.array([2, 11]), np.array([True, False]))
    with pytest.raises(DataError, match=r"sample 11 in .*latents_flip-00001.npy holds NaN or infinity"):
        store.gather(np.array([2, 11]), np.array([False, True]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "f4", "f8"])
def test_rows_that_are_not_finite_are_found_in_every_dtype_and_memory_order(dtype, value):
    largest = np.finfo(dtype).max
    latents = np.where(np.arange(24).reshape(4, 1, 2, 3) % 2, largest, -0.0).astype(dtype)
    assert len(non_finite_rows(latents)) == 0
    latents[1, 0, 1, 1] = latents[3, 0, 0, 0] = value
    for view in (latents, latents[..., ::-1], np.asfortranarray(latents)):
        assert non_finite_rows(view).tolist() == [1, 3]
