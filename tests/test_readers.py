"""Weight files are read without running them, and whatever is wrong with one is said in a line."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddle_dit.errors import ConversionError
from paddle_dit.readers import SafetensorsFile, read_by_content, read_pickled, read_tensors

from .faults.test_pickles import array, call, name, number, row, table, tensor, text, write

ARRAYS = {
    "single": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "half": np.array([1.5, -2], np.float16),
    "whole": np.array(7, np.int64),
    "fortran": np.asfortranarray(np.eye(3, dtype=np.float32)[:, :2]),
}


class Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def same(left, right):
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_arrays(tmp_path, protocol):
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps(OrderedDict(ARRAYS), protocol))
    assert same(read_tensors(path), ARRAYS)


def test_paddle_save_with_its_name_table(tmp_path):
    import paddle

    layer = paddle.nn.Linear(3, 4)
    path = tmp_path / "layer.pdparams"
    paddle.save(layer.state_dict(), str(path))
    assert b"StructuredToParameterName@@" in path.read_bytes()
    assert same(read_tensors(path), {name: tensor.numpy() for name, tensor in layer.state_dict().items()})


def test_bfloat16_becomes_float32(tmp_path):
    import paddle

    values = np.array([1.5, -2.25, 3e38], np.float32)
    half = paddle.to_tensor(values).astype("bfloat16")
    paddle.save({"x": half}, str(tmp_path / "x.pdparams"))
    bits = (half.astype("float32").numpy().view(np.uint32) >> 16).astype(np.uint16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    for suffix in (".pdparams", ".safetensors"):
        assert same(read_tensors(tmp_path / f"x{suffix}"), {"x": half.astype("float32").numpy()})


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, protocol):
    path, victim = tmp_path / "weights.pdparams", tmp_path / "made"
    path.write_bytes(pickle.dumps({**ARRAYS, "x": Touch(victim)}, protocol))
    with pytest.raises(ConversionError, match=r"weights.pdparams is refused: it asks for 'posix.mkdir'"):
        read_tensors(path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())  # the file is really malicious
    assert victim.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile", "os.path.join"])
def test_no_other_global_is_admitted(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "weights.pdparams"
    path.write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ConversionError, match=name):
        read_tensors(path)


def test_codecs_are_not_looked_up(tmp_path):
    path = tmp_path / "weights.pdparams"
    path.write_bytes(b"c_codecs\nencode\n(Vtext\nVrot13\ntR.")
    with pytest.raises(ConversionError, match="rot13"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_cut_short_or_foreign(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pdparams":
        path.write_bytes(pickle.dumps(ARRAYS, 4))
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"a text file, not weights\n"):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=f"weights{suffix} is cut short or no"):
            read_tensors(path)


@pytest.mark.parametrize("values", [[1, 2], {"x": 3}, {"x": "text"}, {1: np.zeros(2)}, {"x": np.array(["a"])}])
def test_pickles_of_other_things(tmp_path, values):
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps(values, 4))
    with pytest.raises(ConversionError, match=r"not a table of tensors|is no tensor"):
        read_tensors(path)


def test_a_file_is_known_by_its_content(tmp_path):
    save_file({"x": np.arange(3, dtype=np.float32)}, tmp_path / "x.pt")
    paddle_file = tmp_path / "x.bin"
    paddle_file.write_bytes(pickle.dumps(ARRAYS, 4))
    write(tmp_path / "x.safetensors", table(x=tensor()))
    assert read_by_content(tmp_path / "x.pt")["x"].tolist() == [0, 1, 2]
    assert same(read_by_content(paddle_file), ARRAYS)
    assert read_by_content(tmp_path / "x.safetensors")["x"].shape == (2, 3)


@pytest.mark.parametrize("mark", [b"\x80", b"PK\x03\x04"])
def test_a_header_length_that_looks_like_another_kind_is_safetensors_all_the_same(tmp_path, mark):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    size = int.from_bytes(mark.ljust(8, b"\0"), "little")
    path = tmp_path / "x.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + header.ljust(size) + np.array([1, 2], "<f4").tobytes())
    assert read_by_content(path)["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty; expected"),
        (b"weights: none\n", "is a text file; expected"),
        (b"  <!DOCTYPE html>", "is a page of HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (bytes(range(7, 200)), "is of no known kind; expected"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "is cut short or no safetensors file"),
    ],
)
def test_what_is_no_weights_file_is_said(tmp_path, content, told):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ConversionError, match=told):
        read_by_content(tmp_path / "x.pt")


def test_safetensors_are_read_one_by_one_with_every_kind_of_number(tmp_path):
    kinds = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"]
    arrays = {kind: np.array([[1, 2, 3]], kind) for kind in kinds} | {"bool": np.array([True, False])}
    arrays |= {"scalar": np.array(2.5), "none": np.zeros((0, 3), np.float32)}
    save_file(arrays, tmp_path / "x.safetensors", {"format": "pd"})
    found = SafetensorsFile(tmp_path / "x.safetensors")
    assert found.metadata == {"format": "pd"}
    assert same(dict(found), arrays)
    assert found["float32"] is not found["float32"]


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(ConversionError, match="no such file"):
        read_tensors(tmp_path / "weights.safetensors")
    with pytest.raises(ConversionError, match=r"end in .safetensors, .pdparams, .pt, .pth, .ckpt or .bin"):
        read_tensors(tmp_path / "weights.npz")
    with pytest.raises(ConversionError, match=r"end in .pdparams, .pt, .pth, .ckpt or .bin"):
        read_pickled(tmp_path / "weights.safetensors")


def test_unusual_arrays(tmp_path):
    arrays = {"big": np.array([1, 2], ">f4"), "flag": np.array(True), "flags": np.eye(2) > 0, "none": np.zeros((0, 3))}
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps({**arrays, "brain": np.array(0x3FC0, np.uint16)}, 4))
    found = read_tensors(path)
    assert same(found, {**arrays, "big": arrays["big"].astype(np.float32), "brain": np.array(1.5, np.float32)})
    assert {type(value) for value in found.values()} == {np.ndarray}


NUMBERS = {
    "torch.DoubleStorage": np.array([1.5, -2], np.float64),
    "torch.FloatStorage": np.array([1.5, -2], np.float32),
    "torch.HalfStorage": np.array([1.5, -2], np.float16),
    "torch.LongStorage": np.array([1 << 40, -2]),
    "torch.IntStorage": np.array([1 << 30, -2], np.int32),
    "torch.ShortStorage": np.array([1 << 14, -2], np.int16),
    "torch.CharStorage": np.array([1, -2], np.int8),
    "torch.ByteStorage": np.array([1, 254], np.uint8),
    "torch.BoolStorage": np.array([True, False]),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_numbers_of_pytorch(tmp_path, suffix):
    storages = {"unused": b"of odd length"}  # what follows lies at odd places
    storages |= {str(key): values.tobytes() for key, values in enumerate(NUMBERS.values(), 1)}
    storages["9"] = b"\x07\x00"  # of bool, as no program should write it
    storages["20"] = struct.pack("<2H", 0x3FC0, 0xC000)
    kinds = {**{kind: str(key) for key, kind in enumerate(NUMBERS, 1)}, "torch.BFloat16Storage": "20"}
    values = {kind: tensor(size=(2,), stride=(1,), count=2, key=key, kind=kind) for kind, key in kinds.items()}
    path = write(tmp_path / f"weights{suffix}", table(**values), storages)
    found = read_tensors(path)
    assert same(found, {**NUMBERS, "torch.BFloat16Storage": np.array([1.5, -2], np.float32)})
    assert found["torch.BoolStorage"].view(np.uint8).tolist() == [1, 0]
    assert all(value.flags.aligned for value in found.values())


def test_views_of_a_storage_of_pytorch(tmp_path):
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    views = {
        "whole": (tensor(), whole),
        "turned": (tensor(size=(3, 2), stride=(1, 3)), whole.T),
        "part": (tensor(number(1), size=(2, 2)), whole[:, 1:]),
        "scalar": (tensor(number(4), size=(), stride=()), np.array(4, np.float32)),
        "empty": (tensor(size=(9, 0)), np.zeros((9, 0), np.float32)),
        "one": (tensor(size=(1, 6), stride=(1 << 61, 1)), whole.reshape(1, 6)),
        "parameter": (call(name("torch._utils._rebuild_parameter"), tensor(), b"\x88", b"N"), whole),
    }
    path = write(tmp_path / "weights.pt", table(**{key: value for key, (value, _) in views.items()}))
    found = read_tensors(path)
    assert same(found, {key: view for key, (_, view) in views.items()})
    assert {type(value) for value in found.values()} == {np.ndarray}
    assert np.shares_memory(found["whole"], found["turned"])
    with pytest.raises(ValueError, match="read-only"):
        found["whole"][0] = 1


def training_checkpoint(path):
    """Write what DiT's training saves: tables, the optimizer's state, and its options as a Namespace."""
    ordered = call(name("collections.OrderedDict")) + b"(" + text("x") + tensor() + b"u"
    ordered += table(_metadata=call(name("collections.OrderedDict"))) + b"b"
    optimizer = table(
        state=b"}" + number(0) + table(exp_avg=tensor()) + b"s", param_groups=b"](" + table(lr=number(1)) + b"e"
    )
    options = name("argparse.Namespace") + b")\x81" + table(model=text("DiT-XL/2"), resume=b"N") + b"b"
    return write(path, table(model=ordered, ema=table(x=array()), opt=optimizer, args=options))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_training_checkpoint(tmp_path, protocol):
    path = training_checkpoint(tmp_path / "0400000.pt")
    found = read_pickled(path)
    assert type(found["model"]) is OrderedDict
    assert found["model"]["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["opt"]["state"][0]["exp_avg"].shape == (2, 3)
    assert found["opt"]["param_groups"] == [{"lr": 1}]
    assert found["args"] == {"model": "DiT-XL/2", "resume": None}
    with pytest.raises(
        ConversionError, match=r"0400000.pt holds tables of tensors \(model, ema\), not tensors; save one"
    ):
        read_tensors(path)
    path = tmp_path / "nested.pdparams"
    path.write_bytes(pickle.dumps({"model": ARRAYS, "step": 3}, protocol))
    assert same(read_pickled(path)["model"], ARRAYS)
    with pytest.raises(ConversionError, match=r"holds tables of tensors \(model\)"):
        read_tensors(path)


def test_tensors_within_tables_of_paddle(tmp_path):
    import paddle

    values = {"data": {"x": paddle.ones([2, 3])}, "step": 3}
    paddle.save(values, str(tmp_path / "nested.pdparams"))
    assert b"tuple" in (tmp_path / "nested.pdparams").read_bytes()
    found = read_pickled(tmp_path / "nested.pdparams")
    assert found["step"] == 3
    assert found["data"]["x"].tolist() == np.ones((2, 3)).tolist()


@pytest.mark.parametrize("args", [(), (number(1),), (row(text("x"), number(1)),), (array(), row(text("x"), array()))])
def test_a_tuple_is_called_only_for_a_name_and_its_numbers(tmp_path, args):
    path = write(tmp_path / "x.pdparams", call(name("builtins.tuple"), *args))
    with pytest.raises(ConversionError, match=r"it calls 'builtins.tuple' as nobody does"):
        read_pickled(path)
    good = write(tmp_path / "x.pdparams", call(name("builtins.tuple"), row(text("x"), array())))
    assert read_pickled(good).shape == (2, 3)


def test_files_that_pytorch_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    random = torch.randn(4, 3, 2)
    tensors = {"plain": random, "turned": random.permute(2, 0, 1), "part": random[1:3, ::2], "half": random.half()}
    tensors |= {
        "parameter": torch.nn.Parameter(random),
        "scalar": torch.tensor(2.5),
        "brain": random.bfloat16()[:, 0].T,
    }
    expected = {key: value.detach() for key, value in tensors.items()}
    expected = {key: (value if key == "half" else value.float()).numpy() for key, value in expected.items()}
    for protocol in (2, 4):
        torch.save({"model": tensors, "ema": OrderedDict(tensors)}, tmp_path / "all.pt", pickle_protocol=protocol)
        assert all(same(found, expected) for found in read_pickled(tmp_path / "all.pt").values())
    torch.save(OrderedDict(tensors), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(read_tensors(tmp_path / "old.pt"), expected)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"offset": number(1)}, "larger than its storage"),
        ({"offset": number(-1)}, "a shape, strides or a length that are none"),
        ({"offset": b"\x89"}, "a shape, strides or a length that are none"),
        ({"stride": (4, 1)}, "larger than its storage"),
        ({"stride": (-3, 1)}, "a shape, strides or a length that are none"),
        ({"stride": (3,)}, "ValueError"),
        ({"stride": (1 << 61, 1)}, "larger than its storage"),
        ({"size": (3, 3)}, "larger than its storage"),
        ({"size": (1 << 70,)}, "a shape, strides or a length that are none"),
        ({"size": (-2, -3)}, "a shape, strides or a length that are none"),
        ({"size": (1 << 40, 1 << 40), "stride": (0, 0)}, "larger than its storage"),
        ({"size": (7,), "stride": (0,)}, "larger than its storage; save a copy"),
        ({"size": (1,) * 65, "stride": (0,) * 65}, "ValueError"),
        ({"count": 7}, "'weights/data/0' has another size"),
        ({"count": -6}, "a shape, strides or a length that are none"),
        ({"kind": "torch.DoubleStorage"}, "'weights/data/0' has another size"),
        ({"kind": "numpy.ndarray"}, "a storage of kind 'numpy.ndarray'"),
        ({"kind": "torch.ComplexFloatStorage"}, "asks for 'torch.ComplexFloatStorage'"),
        ({"key": "1"}, "'weights/data/1' is missing"),
        ({"key": "../data.pkl"}, "'weights/data/../data.pkl' is missing"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, wrong, told):
    assert read_pickled(write(tmp_path / "weights.pt", tensor())).shape == (2, 3)
    with pytest.raises(ConversionError, match=told):
        read_pickled(write(tmp_path / "weights.pt", tensor(**wrong)))


def test_tensors_need_storages_of_their_own(tmp_path):
    for value in (array(), b"N", name("torch.FloatStorage"), tensor()):
        parts = (number(0), row(number(1)), row(number(1)), b"\x89", b"N")
        evil = call(name("torch._utils._rebuild_tensor_v2"), value, *parts)
        with pytest.raises(ConversionError, match="a tensor without a storage"):
            read_pickled(write(tmp_path / "weights.pt", evil))


def patched(place, find, offset, content):
    """Return a damage: bytes at an offset from where a text is for the first time (0) or the last (-1)."""

    def damage(path):
        whole = bytearray(path.read_bytes())
        start = (whole.index(find) if place == 0 else whole.rindex(find)) + offset
        whole[start : start + len(content)] = content
        path.write_bytes(whole)

    return damage


def appended(entry, content=b""):
    def damage(path):
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(entry, content)

    return damage


def rewritten(**options):
    return lambda path: write(path, tensor(), **options)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (rewritten(order=b"big"), "big-endian"),
        (rewritten(compression=zipfile.ZIP_DEFLATED), "entries are compressed"),
        (appended("weights/data/0", bytes(24)), "entries of the same name"),
        (appended("other/data.pkl"), "not one data.pkl"),
        (patched(-1, b"weights/data.pkl", 8, b"data.pkx"), "not one data.pkl"),
        (patched(-1, b"weights/data/0", -4, b"\x01\x00"), "'weights/data/0' lies outside of it"),
        (patched(-1, b"weights/data/0", -4, b"\x00\x00\xff"), "cut short or no PyTorch file"),
        (patched(0, b"weights/data/0", -30, b"PK\x07"), "'weights/data/0' lies outside of it"),
        (patched(0, b"weights/data/0", -2, b"\xff\xff"), "'weights/data/0' lies outside of it"),
        (patched(-1, b"weights/data/0", -26, struct.pack("<II", 1 << 20, 1 << 20)), "lie on each other"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cut short or no PyTorch file"),
        (lambda path: path.write_bytes(b"#!/bin/sh\n" + path.read_bytes()), "cut short or no PyTorch file"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "cut short or no PyTorch file"),
        (lambda path: path.write_bytes(b""), "cut short or no PyTorch file"),
        (lambda path: path.write_bytes(b"a text file\n"), "cut short or no PyTorch file"),
        (lambda path: path.write_bytes(pickle.dumps(0)), "cut short or no PyTorch file"),
    ],
)
def test_a_damaged_zip_is_refused(tmp_path, damage, told):
    path = write(tmp_path / "weights.pt", tensor())
    damage(path)
    with pytest.raises(ConversionError, match=told):
        read_pickled(path)


BEFORE_1_6 = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
SIX = np.arange(6, dtype="<f4").tobytes()


def write_before_1_6(path, value=None, *, keys=("0",), count=6, numbers=SIX, little_endian=True):
    """Write a pickle and its storages as PyTorch did before 1.6; anything may be wrong with it."""
    system = pickle.dumps({"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}, 2)
    value = tensor(view=b"N") if value is None else value
    parts = [BEFORE_1_6, system, b"\x80\x02", value, b".", pickle.dumps(list(keys), 2)]
    path.write_bytes(b"".join([*parts, *(struct.pack("<q", count) + numbers for _ in keys)]))
    return path


def test_a_file_from_before_pytorch_1_6(tmp_path):
    other = tensor(size=(6,), stride=(1,), key="7", kind="torch.IntStorage", view=b"N")
    values = table(x=tensor(view=b"N"), turned=tensor(size=(3, 2), stride=(1, 3), view=b"N"), other=other)
    found = read_tensors(write_before_1_6(tmp_path / "old.pth", values, keys=("7", "0")))
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    other = np.frombuffer(SIX, np.int32)
    assert same(found, {"x": whole, "turned": whole.T, "other": other})
    assert all(value.flags.aligned for value in found.values())
    assert same(read_by_content(tmp_path / "old.pth"), found)


def test_an_attack_in_a_file_from_before_pytorch_1_6_is_refused_and_does_nothing(tmp_path):
    evil = pickle.dumps(Touch(tmp_path / "made"), 2)
    whole = write_before_1_6(tmp_path / "old.pth").read_bytes()
    for start in (len(BEFORE_1_6), whole.index(b"\x80\x02ctorch"), whole.index(pickle.dumps(["0"], 2))):
        (tmp_path / "old.pth").write_bytes(whole[:start] + evil + whole[start:])
        with pytest.raises(ConversionError, match=r"old.pth is refused: it asks for 'posix.mkdir'"):
            read_pickled(tmp_path / "old.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"little_endian": False}, "not said to be little-endian"),
        ({"keys": ()}, "storages are not those of its tensors"),
        ({"keys": ("0", "0")}, "storages are not those of its tensors"),
        ({"keys": ("0", "1")}, "storages are not those of its tensors"),
        ({"keys": (0, "0")}, "storages are not those of its tensors"),
        ({"count": 5}, "storage '0' is cut short or has another length"),
        ({"numbers": bytes(23)}, "storage '0' is cut short or has another length"),
        ({"value": tensor(count=1 << 50, view=b"N")}, "storage '0' is cut short or has another length"),
        ({"value": tensor(view=text("another"))}, "which is no storage"),
        ({"value": row(tensor(), tensor(kind="torch.IntStorage"))}, "there as two kinds"),
        ({"value": tensor(number(1))}, "larger than its storage"),
    ],
)
def test_a_damaged_file_from_before_pytorch_1_6_is_refused(tmp_path, wrong, told):
    assert read_pickled(write_before_1_6(tmp_path / "old.pth")).shape == (2, 3)
    with pytest.raises(ConversionError, match=told):
        read_pickled(write_before_1_6(tmp_path / "old.pth", **wrong))


def test_a_file_from_before_pytorch_1_6_that_is_cut_short_is_refused(tmp_path):
    whole = write_before_1_6(tmp_path / "old.pth").read_bytes()
    for length in range(4, len(whole), 7):
        (tmp_path / "old.pth").write_bytes(whole[:length])
        with pytest.raises(ConversionError, match=r"old.pth is (cut short|refused)"):
            read_pickled(tmp_path / "old.pth")
