"""Hostile pickles: whatever a weights file asks for, it is refused by name, and nothing that it says is done."""

import ast
import copyreg
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from paddle_dit import pickles
from paddle_dit.checkpoint import save_checkpoint
from paddle_dit.config import DiTConfig, ModelInfo
from paddle_dit.conversion.loading import load_model
from paddle_dit.errors import ConversionError
from paddle_dit.readers import read_pickled

from ..conftest import ROOT

BOTH = (".pdparams", ".pt")


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(str(value).encode())) + str(value).encode()


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def row(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *args):
    return function + row(*args) + b"R"


def table(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


ZERO = number(0)


def tensor(offset=ZERO, size=(2, 3), stride=(3, 1), count=6, key="0", kind="torch.FloatStorage", hooks=b"N", view=b""):
    """Return the pickle of a tensor as PyTorch writes it; anything may be wrong with it."""
    kind = name(kind) if isinstance(kind, str) else kind
    storage = row(text("storage"), kind, text(key), text("cpu"), number(count), view)
    shape, steps = (row(*map(number, values)) for values in (size, stride))
    return call(name("torch._utils._rebuild_tensor_v2"), storage + b"Q", offset, shape, steps, b"\x89", hooks)


def array(code=b"f4", raw=bytes(24), shape=(2, 3), kind="numpy.ndarray"):
    """Return the pickle of a NumPy array, of any dtype and class."""
    dtype = call(name("numpy.dtype"), text(code.decode()), b"\x89", b"\x88")
    dtype += row(number(3), text("<"), *[b"N"] * 3, *[number(-1)] * 2, number(0)) + b"b"
    bare = call(name("numpy.core.multiarray._reconstruct"), name(kind), row(number(0)), b"C\x01b")
    raw = raw if isinstance(raw, list) else [b"B" + struct.pack("<I", len(raw)) + raw]
    return bare + row(number(1), row(*map(number, shape)), dtype, b"\x89", *raw) + b"b"


def write(path, value, storages=None, order=b"little", **options):
    """Write a pickle as ``.pdparams``, or into a zip as PyTorch does."""
    if path.suffix == ".pdparams":
        path.write_bytes(b"\x80\x02" + value + b".")
        return path
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("weights/data.pkl", b"\x80\x02" + value + b".")
        file.writestr("weights/byteorder", order)
        for key, content in {"0": np.arange(6, dtype="<f4").tobytes(), **(storages or {})}.items():
            file.writestr(f"weights/data/{key}", content)
    return path


class Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def attack(asked, folder):
    """Return a pickle that makes ``folder/made`` with the help of the global ``asked``."""
    made, python = folder / "made", f"open({str(folder / 'made')!r}, 'w')"
    if asked == "numpy.load":
        np.save(folder / "evil.npy", np.array([Touch(made)]), allow_pickle=True)
        return call(name(asked), text(folder / "evil.npy"), b"N", b"\x88")
    if asked == "functools.partial":
        return call(call(name(asked), name("os.system"), text(f"touch {made}")))
    if asked == "operator.attrgetter":
        return call(call(call(name(asked), text("__self__.eval")), name("builtins.len")), text(python))
    if asked == "subprocess.Popen":
        return call(name(asked), b"](" + text("touch") + text(made) + b"e")
    return call(name(asked), text(f"touch {made}" if asked.endswith("system") else python))


ATTACKS = ("os.system", "posix.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "functools.partial")
ATTACKS += ("operator.attrgetter", "numpy.load")
PLACES = {  # of an attack, and the files that have such places
    "the whole": (lambda evil: evil, BOTH),
    "a value": (lambda evil: table(fine=array(), x=evil), BOTH),
    "a key": (lambda evil: b"}" + evil + b"Ns", BOTH),
    "an array's state": (lambda evil: array(raw=[evil]), BOTH),
    "an array's class": (lambda evil: call(name("numpy.core.multiarray._reconstruct"), evil), BOTH),
    "a Namespace": (lambda evil: name("argparse.Namespace") + b")\x81" + table(x=evil) + b"b", BOTH),
    "the attributes of a table": (lambda evil: call(name("collections.OrderedDict")) + table(x=evil) + b"b", BOTH),
    "a tensor's arguments": (lambda evil: table(fine=tensor(), x=tensor(offset=evil)), (".pt",)),
    "a tensor's hooks": (lambda evil: table(x=tensor(hooks=evil)), (".pt",)),
    "a storage's name": (lambda evil: table(x=tensor(kind=evil)), (".pt",)),
    "a parameter": (lambda evil: call(name("torch._utils._rebuild_parameter"), evil), (".pt",)),
    "left on the stack": (lambda evil: evil + b"0" + table(x=array()), BOTH),
}


@pytest.mark.parametrize("asked", ATTACKS)
def test_the_attacks_are_real(tmp_path, asked):
    path = write(tmp_path / "weights.pdparams", attack(asked, tmp_path))
    script = "import pickle, sys, time; pickle.loads(open(sys.argv[1], 'rb').read()); time.sleep(0.2)"
    subprocess.run([sys.executable, "-c", script, str(path)], check=False, capture_output=True)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("asked", ATTACKS)
@pytest.mark.parametrize(("place", "suffix"), [(place, suffix) for place in PLACES for suffix in PLACES[place][1]])
def test_an_attack_is_refused_by_name_wherever_it_stands(tmp_path, asked, place, suffix):
    path = write(tmp_path / f"weights{suffix}", PLACES[place][0](attack(asked, tmp_path)))
    with pytest.raises(ConversionError, match=f"weights{suffix} is refused: it asks for '{asked}', and only"):
        read_pickled(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("place", PLACES)
def test_every_place_can_be_read_when_there_is_no_attack(tmp_path, place):
    fine = {"an array's state": b"C\x18" + bytes(24), "an array's class": name("numpy.ndarray"), "a key": text("x")}
    fine |= {"a tensor's arguments": number(0), "a storage's name": name("torch.FloatStorage"), "a parameter": tensor()}
    value = PLACES[place][0](fine.get(place, b"N"))
    value = value + b"0N" if place == "an array's class" else value
    read_pickled(write(tmp_path / "weights.pt", value))


@pytest.mark.parametrize("suffix", BOTH)
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"(" + text("touch made") + b"ios\nsystem\n", "asks for 'os.system'"),
        (b"(" + name("os.system") + text("touch made") + b"o", "asks for 'os.system'"),
        (text("os") + text("system") + b"\x93" + row(text("touch made")) + b"R", "asks for 'os.system'"),
        (text("builtins") + text("str.format") + b"\x93", r"asks for 'builtins\.str\.format'"),
        (text("a\x1b[2J\nb") + text("c" * 9999) + b"\x93", r"asks for 'a\\x1b\[2J\\nb\.c{80,90}', and"),
        (name("argparse.Namespace") + b")}\x92", "operation NEWOBJ_EX"),
        (b"\x8f", "operation EMPTY_SET"),
        (b"(\x91", "operation FROZENSET"),
        (b"\x96" + bytes(8), "operation BYTEARRAY8"),
        (b"\x97", "operation NEXT_BUFFER"),
        (b"]" + name("numpy.dtype") + b"R", "it calls list"),
        (text("posix.system") + row(text("touch made")) + b"R", "it calls posix.system"),
        (name("numpy.dtype") + b"]R", r"cut short or no .* \(TypeError"),
        (name("_codecs.encode") + b"N}" + text("__code__") + b"Ns\x86b", "it sets the state of _codecs.encode"),
        (name("collections.OrderedDict") + table(x=b"N") + b"b", "sets the state of collections.OrderedDict"),
        (table(x=b"N") + table(x=b"N") + b"b", "it sets the state of dict"),
        (call(name("collections.OrderedDict"), b"]"), "it calls 'collections.OrderedDict' as nobody does"),
        (call(name("argparse.Namespace"), b"N"), "it calls 'argparse.Namespace' as nobody does"),
        (name("argparse.Namespace") + b")\x81N" + table(x=b"N") + b"\x86b", "something else than its values by name"),
        (name("argparse.Namespace") + b")\x81}" + number(1) + b"Nsb", "something else than its values by name"),
        (call(name("numpy.ndarray"), row(number(1 << 40))), "it calls 'numpy.ndarray' as nobody does"),
        (call(name("numpy.dtype"), text("O"), b"\x89", b"\x88"), "an array of 'O' is no tensor"),
        (call(name("numpy.dtype"), b"]"), "an array of 'list' is no tensor"),
        (call(name("numpy.dtype"), text("f4")) + row(number(3), text("<")) + b"b", "something else than a byte order"),
        (array(b"O8", shape=(3,)), "an array of 'O8' is no tensor"),
        (array(kind="collections.OrderedDict"), "something else than an array"),
        (array(raw=[b"](Ne"]), "an array something else than numbers"),
        (array(shape=(2, 4)), r"shape \(2, 4\) has 24 bytes"),
        (array(shape=(-2, -3)), "shape, strides or a length that are none"),
        (array(shape=(1 << 61, 8)), "has 24 bytes"),
        (b"Pos.system\n", "it asks for 'os.system'"),
        (name("numpy.dtype"), "it holds a numpy.dtype, and only"),
        (number(1 << 70), "it holds a int, and only"),
        (b"N" + b"\x85" * 60, "nests them deeper than 50"),
        (b"]2a", "nests them deeper than 50"),
        (b"}N" + b"\x85" * 200_000 + b"Ns", "names an entry by a tuple"),
        (b"}" + number(1 << 61) + b"Ns", "names an entry by a int; names are texts or small numbers"),
        (b"]" + number(0) + b"Ns", "it names an entry of a list"),
        (b"}(]Nu", "names an entry by a list"),
        (b"(}Nd", "names an entry by a dict"),
        (b"]q\x00" + b"(h\x00h\x00tq\x00" * 24, "holds more than 2,000,000 values"),
        (text("x" * 999) + b"q\x010" + (name("_codecs.encode") + b"h\x01Vlatin1\n\x86R0") * 9, "larger than itself"),
        (b"\x8e" + struct.pack("<Q", 1 << 60), "EOFError: a length in it goes beyond its end"),
        (b"\x95" + struct.pack("<Q", 1 << 60), "EOFError: a length in it goes beyond its end"),
        (b"\x8d" + struct.pack("<Q", 1 << 60), "EOFError: a length in it goes beyond its end"),
        (b"\x8b" + struct.pack("<i", (1 << 31) - 1), "EOFError: a length in it goes beyond its end"),
    ],
)
def test_every_other_way_is_closed(tmp_path, monkeypatch, suffix, value, told):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / f"weights{suffix}", value)
    with pytest.raises(ConversionError, match=told) as refusal:
        read_pickled(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert os.listdir(tmp_path) == [path.name]


def test_registered_extensions_are_not_looked_up(tmp_path):
    copyreg.add_extension("posix", "system", 240)
    try:
        assert pickle.loads(b"\x82\xf0.") is os.system  # from now on no unpickler is asked for its name
        path = write(tmp_path / "weights.pt", b"\x82\xf0" + row(text(f"touch {tmp_path / 'made'}")) + b"R")
        with pytest.raises(ConversionError, match="operation EXT1"):
            read_pickled(path)
    finally:
        copyreg.remove_extension("posix", "system", 240)
        copyreg.clear_extension_cache()
    assert not (tmp_path / "made").exists()


def test_steps_are_bounded_and_a_large_number_in_the_memo_takes_no_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "weights.pdparams", b"}r\xff\xff\xff\x7f")
    assert read_pickled(path) == {}
    monkeypatch.setattr(pickles, "MAX_VALUES", 1000)
    with pytest.raises(ConversionError, match="takes more than 1,000 steps"):
        read_pickled(write(path, b"]" * 1000))


@pytest.fixture
def evil_places(tmp_path):
    """Return folders and files of all kinds that hold an attack, and a run that holds none."""
    from paddle_dit.models.dit import DiT

    evil = attack("os.system", tmp_path)
    info = ModelInfo(DiTConfig(sample_size=8, hidden_size=48, depth=1, num_heads=3, num_classes=3))
    (tmp_path / "pipe" / "transformer").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    info.save(tmp_path / "pipe" / "paddle_dit.json")
    info.save(tmp_path / "config.json")
    shutil.copytree(ROOT / "data" / "digits_vae", tmp_path / "vae")
    for path in (tmp_path / "vae").glob("*.safetensors"):
        path.unlink()
    for path in ("vae/model_state.pdparams", "pipe/transformer/model_state.pdparams", "x.pdparams", "x.pt"):
        write(tmp_path / path, table(x=evil))
    tensors = {key: value.numpy() for key, value in DiT(info.config).state_dict().items()}
    save_checkpoint(tmp_path / "run", 1, info, {"model": tensors, "ema": tensors}, {})
    return tmp_path


@pytest.mark.parametrize("place", ["x.pt", "x.pdparams", "pipe"])
def test_a_model_to_load_is_not_run(evil_places, place):
    with pytest.raises(ConversionError, match=r"asks for 'os\.system'"):
        load_model(evil_places / place)
    assert not (evil_places / "made").exists()


@pytest.mark.parametrize(
    "command",
    [
        "scripts/sample.py --model {0}/x.pdparams --vae data/digits_vae --output {0}/out",
        "scripts/sample.py --model {0}/run --vae {0}/vae --output {0}/out",
        "scripts/convert_dit_to_ppdiffusers.py --checkpoint {0}/x.pt --vae data/digits_vae --output {0}/out",
        "scripts/convert_dit_to_ppdiffusers.py --checkpoint {0}/run --vae {0}/vae --output {0}/out",
    ],
)
def test_a_command_that_is_given_an_attack_says_so_and_does_nothing(evil_places, run_here, command):
    result = run_here(*command.format(evil_places).split())
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "is refused: it asks for 'os.system'" in result.stderr
    assert not (evil_places / "made").exists()
    assert not (evil_places / "out").exists()


UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLERS |= {"paddle.load", "torch.load", "pandas.read_pickle", "numpy.load", "yaml.load"}


def unpickling(source):
    """Return what in a module's text can load a pickle; ``numpy.load`` cannot with ``allow_pickle=False``."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    meant = {alias.asname: alias.name for node in imports for alias in node.names if alias.asname} | {"np": "numpy"}
    named = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    named += [
        f"{node.module}.{alias.name}" for node in imports if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    safe = {
        ast.unparse(node.func) + str(node.func.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "allow_pickle=False" in map(ast.unparse, node.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) + str(node.lineno) not in safe:
            first, *rest = ast.unparse(node).split(".")
            named.append(".".join([meant.get(first, first), *rest]))
    return sorted({dotted for dotted in named if dotted in UNPICKLERS or dotted.split(".")[0] in UNPICKLERS})


def test_no_module_unpickles():
    modules = [path for room in ("paddle_dit", "scripts", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    modules += ROOT.glob("*.py")
    assert len(modules) > 50
    found = {path.relative_to(ROOT).as_posix(): unpickling(path.read_text(encoding="utf-8")) for path in modules}
    assert set(found.pop("paddle_dit/pickles.py")) >= {"pickle", "pickle._Unpickler"}
    # It talks to processes that it has started itself, over pipes that nobody else has.
    assert "pickle.load" in found.pop("paddle_dit/data/image_workers.py")
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p\np.loads(x)",
        "def f():\n    from pickle import loads",
        "import paddle as pd\nread = pd.load",
        "from torch import load",
        "import torch\ntorch.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import numpy\nwith numpy.load(x, mmap_mode='r') as f: pass",
        "import joblib\njoblib.load(x)",
    ],
)
def test_a_module_that_unpickles_would_be_seen(source):
    assert unpickling(source)
    assert not unpickling("import numpy as np\nnp.load(x, allow_pickle=False)\nmodel.load(y)\njson.load(z)")
