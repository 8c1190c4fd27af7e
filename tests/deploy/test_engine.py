import json

import pytest

from paddle_dit.deploy import InferencePipeline
from paddle_dit.deploy.engine import EngineInfo
from paddle_dit.errors import DeployError
from paddle_dit.files import read_json, write_json

from .conftest import MAX_BATCH_SIZE, NAMES


def change(folder, **values):
    write_json(folder / "deploy.json", {**read_json(folder / "deploy.json", AssertionError), **values})


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
    ("values", "said"),
    [
        ({"format": "other"}, "no engine"),
        ({"format_version": 2}, "no engine of this version"),
        ({"model": {"depth": -1}}, "damaged"),
        ({"model": []}, "damaged"),
        ({"vae": {}}, "damaged"),
        ({"files": {"x": 3}}, "damaged"),
        ({"label_names": {"one": "1"}}, "damaged"),
        ({"scheduler": {"beta_end": 0.012}}, "another noise schedule"),
        ({"device": "gpu:0"}, "--fallback"),
    ],
)
def test_a_damaged_description_is_said_in_one_line(engine, values, said):
    change(engine, **values)
    with pytest.raises(DeployError, match=said) as refusal:
        InferencePipeline.from_pretrained(engine)
    assert "\n" not in str(refusal.value)


def test_what_is_no_engine_is_said(tmp_path):
    with pytest.raises(DeployError, match=r"export_inference\.py"):
        InferencePipeline.from_pretrained(tmp_path)
    (tmp_path / "deploy.json").write_text("[")
    with pytest.raises(DeployError, match="not valid JSON"):
        InferencePipeline.from_pretrained(tmp_path)


def test_an_engine_of_another_device_runs_on_the_cpu_where_that_is_asked_for(engine, pipeline):
    change(engine, device="gpu:0", backend="onnxruntime-tensorrt")
    fallen = InferencePipeline.from_pretrained(engine, fallback=True)
    assert (fallen([1], 2).pixels == pipeline([1], 2).pixels).all()
