"""Arbitrary and mutated data files and checkpoints: they are read or refused by the error of their kind, in place."""

import contextlib
import copy
import json
import struct

import numpy as np
import pytest
from hypothesis import strategies as st

from paddle_dit.checkpoint import (
    INFO,
    MANIFEST,
    STATE,
    Checkpoint,
    find_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.data.labels import read_label_names
from paddle_dit.data.npy import map_npy, read_npy
from paddle_dit.data.source import open_source
from paddle_dit.data.store import INDEX, StoreWriter
from paddle_dit.errors import CheckpointError, ConfigError, ConversionError, DataError
from paddle_dit.files import describe
from paddle_dit.readers import read_tensors
from paddle_dit.training import plan_report
from paddle_dit.training.plan import make_plan
from paddle_dit.training.recipe import TrainRecipe

from .test_fuzz_commands import JSON, TEXT, few_and_many, fuzzed, snapshot

BYTES = st.binary(max_size=200)


@contextlib.contextmanager
def refused_or_done(folder, *errors):
    """Let a block end well or by one of ``errors`` that says something, with nothing in ``folder`` changed."""
    before, said = snapshot(folder), "nothing is wrong"
    try:
        yield
    except errors as error:
        said = str(error)
    assert said.strip()
    assert snapshot(folder) == before


@st.composite
def mutated(draw, values):
    """Draw JSON values with one to three places replaced, removed, added, nudged or filled from beside them."""
    root = {"": copy.deepcopy(values)}
    for _ in range(draw(st.integers(1, 3))):
        spots = list(places(root))
        holder, key = spots[draw(st.integers(0, len(spots) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add", "nudge", "copy"]))
        if action == "remove" and holder is not root:
            del holder[key]
        elif action == "add" and isinstance(holder[key], dict):
            holder[key]["a new key"] = draw(JSON)
        elif action == "nudge" and isinstance(holder[key], int):
            holder[key] += draw(st.integers(-9, 9))
        elif action == "copy":
            beside = list(holder.values() if isinstance(holder, dict) else holder)
            holder[key] = copy.deepcopy(beside[draw(st.integers(0, len(beside) - 1))])
        else:
            holder[key] = draw(JSON)
    return root[""]


def places(values):
    """Yield every place in JSON values: the dict or list that holds it, and its key."""
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from places(values[key])


def json_files(values):
    """Draw the bytes of a JSON file: any bytes, any JSON, or ``values`` mutated."""
    changed = mutated(values)
    return BYTES | st.one_of(JSON, changed, changed, changed).map(lambda some: json.dumps(some).encode())


@pytest.fixture
def store(tmp_path):
    """Return a store of two shards and their mirrored images, with 12 samples."""
    random = np.random.default_rng(0)
    with StoreWriter(
        tmp_path / "store",
        sample_shape=(4, 8, 8),
        num_classes=3,
        label_names={0: "zero", 2: "two"},
        vae={"name": "none", "scaling_factor": 1.0, "image_size": 64},
        shard_size=8,
        flip=True,
    ) as writer:
        latents = random.standard_normal((12, 4, 8, 8))
        writer.append(latents, np.arange(12) % 3, latents[..., ::-1])
    return tmp_path / "store"


@few_and_many
def test_any_index_opens_a_store_or_is_refused(examples, store):
    index = json.loads((store / INDEX).read_text())
    recipe = TrainRecipe(model="DiT-S/2", feature_path=store, global_batch_size=4, dry_run=True)
    explicit = [(json.dumps({**index, key: value}).encode(),) for key, value in HOSTILE_ENTRIES]

    @fuzzed(examples, json_files(index), explicit=explicit)
    def read(text):
        (store / INDEX).write_bytes(text)
        with refused_or_done(store, DataError, ConfigError):
            source = open_source(store)
            samples, labels = source.gather(np.arange(len(source)))
            assert samples.dtype == np.float32
            assert len(labels) == len(source)
            assert plan_report.describe(make_plan(recipe))

    read()


HOSTILE_ENTRIES = [
    ("num_classes", 10**30),
    ("num_classes", True),
    ("label_names", {"1" * 5000: "x"}),
    ("vae", {"image_size": "64"}),
    ("vae", {"image_size": float("nan")}),
    ("labels", {"file": "x" * 300, "bytes": 1, "sha256": ""}),
    ("labels", {"file": "a\0b", "bytes": 1, "sha256": ""}),
    ("labels", {"file": "\ud800", "bytes": 1, "sha256": ""}),
    ("labels", {"file": "", "bytes": 4096, "sha256": "\ud800"}),
]


@st.composite
def npy_files(draw):
    """Draw the bytes of a .npy file: any, or a valid one with another header, a byte changed, or its end cut off."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x01\x00"])) + draw(BYTES)
    size = st.sampled_from([0, 1, 2, 3, 6, -1, 2**31, 2**63, 10**30]) | st.integers()
    kinds = [
        "<f4",
        "<f2",
        ">f4",
        "<i8",
        "|O",
        "|V0",
        "|V9999999999",
        "<U4",
        "|S0",
        "<M8",
        "<c16",
        "(2,)<f4",
        "",
        "f4,f4",
    ]
    header = {
        "descr": draw(st.sampled_from(kinds) | st.just([("a", "<f4"), ("b", "|O")]) | JSON),
        "fortran_order": draw(st.booleans() | JSON),
        "shape": draw(st.lists(size, max_size=4).map(tuple) | JSON),
    }
    for key in draw(st.lists(st.sampled_from(sorted(header)), max_size=1)):
        del header[key]
    text = draw(st.just(repr(header)) | TEXT).encode(errors="surrogatepass")
    text += b" " * draw(st.integers(0, 64)) + b"\n"
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 0, 255]))
    length = max(0, len(text) + draw(st.sampled_from([0, 0, 0, -1, 1, 1000])))
    whole = b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", length) + text + bytes(24)
    return draw(damaged(whole))


@st.composite
def damaged(draw, whole):
    """Draw ``whole`` as it is, with a byte changed, or cut off."""
    place = draw(st.integers(0, len(whole) - 1))
    return draw(
        st.sampled_from([whole, whole[:place], whole[:place] + draw(st.binary(max_size=2)) + whole[place + 1 :]])
    )


@few_and_many
def test_any_npy_file_is_an_array_or_is_refused(examples, tmp_path):
    path = tmp_path / "array.npy"

    @fuzzed(examples, npy_files(), explicit=[(zip_of_arrays(tmp_path / "zip.npz"),)])
    def read(raw):
        path.write_bytes(raw)
        for reader in (read_npy, map_npy):
            with refused_or_done(tmp_path, DataError):
                array = reader(path)
                assert isinstance(array, np.ndarray)
                assert not array.dtype.hasobject
                assert array.nbytes <= len(raw)

    read()


def zip_of_arrays(path):
    """Return the bytes of an .npz file."""
    np.savez(path, a=np.zeros(3))
    raw = path.read_bytes()
    path.unlink()
    return raw


@pytest.fixture
def checkpoint(tmp_path):
    """Write a whole checkpoint, in a run of its own."""
    info = ModelInfo(DiTConfig.from_preset("DiT-Digits/2"), {0: "zero"}, {"name": "v", "scaling_factor": 0.5})
    state = {"identity": {"a": 1}, "recipe": {"model": "x"}, "environment": {"ranks": 1}, "step": 7}
    tensors = {"model": {"w": np.ones((2, 3), np.float32)}, "ema": {"w": np.zeros((2, 3), np.float32)}}
    return save_checkpoint(tmp_path / "run", 7, info, tensors, state)


@few_and_many
@pytest.mark.parametrize("name", [MANIFEST, INFO, STATE])
def test_any_json_of_a_checkpoint_is_read_or_refused(examples, name, checkpoint):
    folder, run = checkpoint.folder, checkpoint.folder.parent
    values = json.loads((folder / name).read_text())
    manifest = json.loads((folder / MANIFEST).read_text())

    @fuzzed(examples, json_files(values), explicit=[(json.dumps(some).encode(),) for some in HOSTILE_JSON])
    def read(text):
        (folder / name).write_bytes(text)
        if name != MANIFEST:
            manifest["files"][name] = describe(folder / name)
            (folder / MANIFEST).write_text(json.dumps(manifest))
        for find, where in (
            (open_checkpoint, folder),
            (find_checkpoint, folder),
            (find_checkpoint, run),
            (newest, run),
        ):
            with refused_or_done(run, CheckpointError):
                found = find(where)
                assert found.folder == folder
                assert type(found.step) is int
                assert isinstance(found.state, dict)
                assert found.info.config.num_parameters() + found.info.config.multiply_adds() > 0
                assert found.tensors("model")["w"].shape == (2, 3)

    read()


HOSTILE_JSON = [
    {"format": "paddle_dit", "model": {"depth": 10**9}},
    {"format": "paddle_dit", "model": {"mlp_ratio": float("inf")}},
    {"format": "paddle_dit", "model": {}, "label_names": {"a": "b"}},
    {"format": "paddle_dit", "model": {}, "label_names": {"9" * 5000: "b"}},
    {"format": "paddle_dit", "model": {}, "vae": ["name"]},
    {"format_version": 1, "step": float("nan"), "files": {}},
    {"format_version": 1, "step": 7, "files": {"x" * 300: {"bytes": 1, "sha256": ""}}},
    {"format_version": 1, "step": 7, "files": {"a\0b": {"bytes": 1, "sha256": ""}}},
    {"format_version": 1, "step": 7, "files": {"": {"bytes": 1, "sha256": ""}}},
]


def newest(run):
    told = []
    try:
        return newest_checkpoint(run, told.append)
    finally:
        assert all(isinstance(line, str) and line.strip() for line in told)


@few_and_many
def test_any_file_of_class_names_is_read_or_refused(examples, tmp_path):
    path, names = tmp_path / "names.json", {"0": "zero", "1": "one", "9": "nine"}

    @fuzzed(examples, json_files(names), explicit=[(b'{"' + b"9" * 5000 + b'": "x"}',)])
    def read(text):
        path.write_bytes(text)
        with refused_or_done(tmp_path, ConfigError):
            assert all(0 <= label < 10 and isinstance(name, str) for label, name in read_label_names(path, 10).items())

    read()


@st.composite
def safetensors_files(draw):
    """Draw the bytes of a .safetensors file: any, or a small one with a mutated header, length or end."""
    header = {
        "__metadata__": {"format": "np"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [32, 40]},
    }
    for name in draw(st.lists(st.sampled_from(["__metadata__", "b", "c"]), max_size=3)):
        header.pop(name, None)
    last = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    text = draw(st.just(header) | mutated(header) | JSON)
    text = json.dumps(text).encode()
    length = draw(st.sampled_from([len(text)] * 5 + [0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1]))
    return draw(damaged(struct.pack("<Q", length) + text + bytes(last)) | BYTES)


@few_and_many
def test_any_safetensors_file_is_read_or_refused(examples, tmp_path):
    path = tmp_path / "model.safetensors"

    @fuzzed(examples, safetensors_files())
    def read(raw):
        path.write_bytes(raw)
        with refused_or_done(tmp_path, ConversionError):
            assert all(isinstance(array, np.ndarray) for array in read_tensors(path).values())
        with refused_or_done(tmp_path, CheckpointError):
            assert all(isinstance(array, np.ndarray) for array in Checkpoint(tmp_path, 7).tensors("model").values())

    read()
