"""Damaged data: whatever happens to a file of a store, opening or verifying names it, and training stops."""

import itertools
import re
import shutil

import numpy as np
import pytest

from paddle_dit.data.npy_pairs import NpyPairs
from paddle_dit.data.source import open_source
from paddle_dit.data.store import StoreWriter
from paddle_dit.data.verify import open_check
from paddle_dit.errors import DataError

SHARDS = [f"latents{flip}-0000{number}.npy" for flip in ("", "_flip") for number in range(3)]
FILES = [*SHARDS, "labels.npy", "index.json"]


def flip_bit(where):
    """Return a damage: one bit of the first, the middle or the last byte."""

    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(where * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first byte": flip_bit(0),
    "middle byte": flip_bit(0.5),
    "last byte": flip_bit(1),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
UNREADABLE = ("deleted", "emptied", "cut in half", "zeroed", "first byte", "a folder")  # even an index is, after these


def write_store(folder, seed=0, num_classes=10, shape=(4, 8, 8)):
    """Write 24 latents in three shards of the same length, with as many of the mirrored images."""
    random = np.random.default_rng(seed)
    latents = random.standard_normal((2, 24, *shape)).astype(np.float32)
    with StoreWriter(folder, sample_shape=shape, num_classes=num_classes, shard_size=8, flip=True) as writer:
        writer.append(latents[0], random.integers(0, num_classes, 24), latents[1])
    return folder


def write_pairs(folder):
    for kind in ("features", "labels"):
        (folder / kind).mkdir(parents=True)
    for index in range(16):
        latent = np.random.default_rng(index).standard_normal((1, 4, 8, 8)).astype(np.float32)
        np.save(folder / "features" / f"{index}.npy", latent)
        np.save(folder / "labels" / f"{index}.npy", np.array([index % 10]))
    return folder


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store")


def verdict(folder):
    """Return the lines of verification, those of an index that cannot be read included."""
    try:
        return list(open_check(folder, num_classes=10).problems())
    except DataError as error:
        return [str(error)]


def refusal(folder):
    """Return why the folder cannot be opened for training, or None."""
    try:
        open_source(folder)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_of_a_store_is_found_and_named(store, name, damage):
    assert verdict(store) == []
    assert refusal(store) is None
    DAMAGES[damage](store / name)
    told = verdict(store)
    assert any(name in line for line in told)
    if name != "index.json":  # a whole file is bad too where it no longer agrees with the index
        assert not any(other in line for line in told for other in SHARDS if other != name)
    assert all("\n" not in line for line in told)
    if (damage not in ("middle byte", "last byte") and name != "index.json") or damage in UNREADABLE:
        assert name in refusal(store)


@pytest.mark.parametrize("name", ["latents-00001.npy", "labels.npy", "index.json"])
def test_one_changed_bit_in_any_byte_is_found_and_named(tmp_path, name):
    store = write_store(tmp_path / "store", shape=(4, 2, 2))
    content = (store / name).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (store / name).write_bytes(changed)
        assert any(name in line for line in verdict(store)), position
        refusal(store)  # opening may miss it, but says nothing that is no DataError
    print(f"{len(content)} changed bits of {name} were found")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SHARDS, 2)))
def test_two_swapped_shards_are_both_named(store, one, other):
    (store / one).rename(store / "aside")
    (store / other).rename(store / one)
    (store / "aside").rename(store / other)
    told = "\n".join(verdict(store))
    assert one in told
    assert other in told


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_store_of_the_same_form_is_found(store, tmp_path, name):
    other = write_store(tmp_path / "other", seed=1)
    assert (other / name).stat().st_size == (store / name).stat().st_size
    shutil.copy(other / name, store / name)
    told = "\n".join(verdict(store))
    for file in FILES[:-1] if name == "index.json" else [name]:
        assert file in told
    assert re.search(
        rf"{'labels.npy' if name == 'index.json' else name} is not the file that index.json describes: of another run",
        refusal(store),
    )


def test_labels_of_a_store_with_more_classes_are_refused_at_opening(store, tmp_path):
    other = write_store(tmp_path / "other", num_classes=1000)
    shutil.copy(other / "labels.npy", store / "labels.npy")
    assert "outside [0, 10)" in refusal(store)
    assert any("labels.npy has labels outside [0, 10)" in line for line in verdict(store))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["features/11.npy", "labels/11.npy"])
def test_a_damaged_pair_is_named_if_its_bytes_can_tell(tmp_path, name, damage):
    folder = write_pairs(tmp_path / "pairs")
    assert verdict(folder) == []
    DAMAGES[damage](folder / name)
    told = verdict(folder)
    if damage in ("middle byte", "last byte") and name == "features/11.npy":
        assert told == []  # another finite number: pairs carry no sums
        return
    assert len(told) == 1
    assert "11.npy" in told[0]
    with pytest.raises(DataError, match=r"11\.npy"):
        NpyPairs(folder, num_classes=10).gather(np.arange(16))


def nan_when_mirrored(folder):
    write_store(folder)
    for number in range(3):
        np.load(folder / f"latents_flip-0000{number}.npy", mmap_mode="r+")[1:, 0, 0, 0] = (
            np.nan
        )  # opening looks at the first


def damaged(name, damage):
    return lambda folder: DAMAGES[damage](write_store(folder) / name)


def damaged_pair(name, array):
    return lambda folder: np.save(write_pairs(folder) / name, array)


TRAINING = {
    "a short shard": (damaged("latents-00002.npy", "cut by one byte"), r"latents-00002.npy has \d+ bytes"),
    "a header": (damaged("latents_flip-00000.npy", "first byte"), "latents_flip-00000.npy is not a readable"),
    "NaN in mirrored latents": (nan_when_mirrored, r"sample \d+ in .*latents_flip-0000\d.npy holds NaN"),
    "infinity in a pair": (
        damaged_pair("features/3.npy", np.full((1, 4, 8, 8), np.inf, np.float32)),
        r"features/3.npy \(sample 3\) holds NaN or infinity",
    ),
    "a label that is no class": (
        damaged_pair("labels/7.npy", np.array([10])),
        r"labels/7.npy \(sample 7\) says class 10 of 10",
    ),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_on_damaged_data_stops_with_one_line(case, run_here, tmp_path):
    make, told = TRAINING[case]
    make(tmp_path / "data")
    output = tmp_path / "run"
    command = ["train.py", "--model", "DiT-Digits/2", "--feature-path", tmp_path / "data", "--output-dir", output]
    result = run_here(*command, "--global-batch-size", "16", "--max-steps", "2", "--num-classes", "10")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(errors) == 1
    assert re.search(told, errors[0])
    assert not list(output.glob("checkpoint-*"))
