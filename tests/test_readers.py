"""Weight files are read without running them, and whatever is wrong with one is said in a line."""

import json
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from safetensors.numpy import save_file

from paddle_dit.errors import ConversionError
from paddle_dit.readers import read_stock_weights, read_tensors

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


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(ConversionError, match="no such file"):
        read_tensors(tmp_path / "weights.safetensors")
    with pytest.raises(ConversionError, match=r"end in .safetensors or .pdparams"):
        read_tensors(tmp_path / "weights.bin")


def test_pytorch_layout_in_a_stock_folder_is_refused(tmp_path):
    save_file(ARRAYS | {"fortran": np.eye(3)}, tmp_path / "diffusion_paddle_model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match="PyTorch's layout"):
        read_stock_weights(tmp_path)
