import json

import pytest

from paddle_dit.deploy import InferencePipeline
from paddle_dit.deploy.backends import BACKENDS
from paddle_dit.deploy.engine import EngineInfo
from paddle_dit.errors import DeployError
from paddle_dit.files import read_json, write_json

from .conftest import MAX_BATCH_SIZE, NAMES, sign


def test_the_folder_describes_itself(exported, source):
    values = json.loads((exported[0] / "deploy.json").read_text())
    assert values["label_names"] == {str(label): name for label, name in NAMES.items()}
    assert (values["backend"], values["precision"], values["max_batch_size"]) == ("onnxruntime", "fp32", MAX_BATCH_SIZE)
    assert values["programs"]["cached_step"]["inputs"]["x"] == ["float32", ["images", 4, 8, 8]]
    assert values["scheduler"]["beta_end"] == 0.02
    assert len(values["source"]["weights_sha256"]) == 64
    assert values["parity"]["decoder, batch 1"]["max error"] < 1e-4
    assert set(values["files"]) == {
        "parity.npz",
        *(f"programs/{name}.onnx" for name in ("cached_step", "conditioning", "decoder")),
    }
    info = EngineInfo.load(exported[0])
    assert (info.config, info.label_names) == (source.info.config, NAMES)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "not what was exported"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.with_name("other.onnx").write_bytes(b""), "does not name"),
    ],
)
def test_a_damaged_file_is_found_before_it_is_opened(engine, damage, said):
    damage(engine / "programs" / "cached_step.onnx")
    with pytest.raises(DeployError, match=said) as refusal:
        InferencePipeline.from_pretrained(engine)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vae", {"scaling_factor": 0.7}),
        ("label_names", {"3": "digit 4"}),
        ("model", {"num_classes": 9}),
        (None, {"precision": "fp16"}),
        (None, {"max_batch_size": "8"}),
        (None, {"parity": {}}),
        (None, {"description_sha256": None}),
        (None, {"more": 1}),
    ],
)
def test_a_description_that_was_changed_is_refused(engine, part, values):
    found = read_json(engine / "deploy.json", AssertionError)
    (found if part is None else found[part]).update(values)
    write_json(engine / "deploy.json", found)
    with pytest.raises(DeployError, match="is not what was exported, it was") as refusal:
        InferencePipeline.from_pretrained(engine)
    assert "\n" not in str(refusal.value)


def test_a_description_may_be_written_in_another_form(engine):
    found = read_json(engine / "deploy.json", AssertionError)
    (engine / "deploy.json").write_text(json.dumps(dict(reversed(found.items()))))
    assert EngineInfo.load(engine).label_names == NAMES


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format": "other"}, "no engine"),
        ({"format_version": 1}, "no engine of this version"),
        ({"model": {"depth": -1}}, "damaged"),
        ({"model": []}, "damaged"),
        ({"model": {"sample_size": 10}}, "damaged"),
        ({"vae": {}}, "damaged"),
        ({"vae": {"scaling_factor": "4", "factor": 4}}, "damaged"),
        ({"vae": {"scaling_factor": 1.0, "factor": "4"}}, "damaged"),
        ({"files": {"x": 3}}, "damaged"),
        ({"files": {"x": {"bytes": float("inf"), "sha256": ""}}}, "damaged"),
        ({"files": {}}, "damaged"),
        ({"label_names": {"one": "1"}}, "damaged"),
        ({"max_batch_size": "8"}, "damaged"),
        ({"max_batch_size": 2}, "programs of another model"),
        ({"device": None}, "damaged"),
        ({"device": "gpu:x"}, "damaged"),
        ({"backend": "static"}, "damaged"),
        ({"backend": ["onnxruntime"]}, "damaged"),
        ({"versions": None}, "damaged"),
        ({"source": {}}, "damaged"),
        ({"sampling": {"sampler": "ddim", "more": 1}}, "damaged"),
        ({"cuda_graph": "no"}, "damaged"),
        ({"scheduler": {"beta_end": 0.012}}, "another noise schedule"),
        ({"device": "gpu:0"}, "--fallback"),
    ],
)
def test_a_description_that_no_export_writes_is_refused_in_one_line(engine, values, said):
    sign(engine, **values)
    with pytest.raises(DeployError, match=said) as refusal:
        InferencePipeline.from_pretrained(engine)
    assert "\n" not in str(refusal.value)


def test_what_is_no_engine_is_said(tmp_path):
    with pytest.raises(DeployError, match=r"export_inference\.py"):
        InferencePipeline.from_pretrained(tmp_path)
    (tmp_path / "deploy.json").write_text("[")
    with pytest.raises(DeployError, match="not valid JSON"):
        InferencePipeline.from_pretrained(tmp_path)


class WithoutTensorRT:
    """What ONNX Runtime with TensorRT compiled in, and without its libraries, does: only opening a program shows it."""

    def __new__(cls):
        from paddle_dit.deploy.onnx_runtime import OnnxRuntimeTensorRT

        class Unable(OnnxRuntimeTensorRT):
            def check(self, settings):
                pass

            def open(self, spec, folder, name, settings):
                raise DeployError("no library of TensorRT")

        return Unable()


@pytest.mark.parametrize("shown", ["at once", "by opening"])
def test_an_engine_of_another_device_runs_on_the_cpu_where_that_is_asked_for(engine, pipeline, shown, monkeypatch):
    if shown == "by opening":
        monkeypatch.setitem(BACKENDS, "onnxruntime-tensorrt", (__name__, "WithoutTensorRT", "onnxruntime"))
    sign(engine, device="gpu:0", backend="onnxruntime-tensorrt")
    with pytest.raises(DeployError, match=r"Tensor(RT|rt).*--fallback"):
        InferencePipeline.from_pretrained(engine)
    told = []
    fallen = InferencePipeline.from_pretrained(engine, fallback=True, report=told.append)
    assert (fallen([1], 2).pixels == pipeline([1], 2).pixels).all()
    assert (fallen.backend, fallen.settings.device) == ("onnxruntime", "cpu")
    (line,) = told
    assert line.startswith("onnxruntime-tensorrt on gpu:0 cannot run here (")


def test_there_is_nothing_to_fall_back_to_from_the_plain_backend(engine):
    (engine / "programs" / "decoder.onnx").write_bytes(b"no program")
    sign(engine)
    with pytest.raises(DeployError, match=r"cannot open .* with this one$"):
        InferencePipeline.from_pretrained(engine, fallback=True)
