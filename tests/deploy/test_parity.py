from dataclasses import replace
from io import BytesIO

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from paddle_dit.deploy import InferencePipeline
from paddle_dit.deploy.backends import BACKENDS, Settings
from paddle_dit.deploy.export import build_pipeline, export, sampler_of
from paddle_dit.deploy.parity import Figure, check, compare, load_reference, psnr
from paddle_dit.deploy.reference import make_reference
from paddle_dit.deploy.specs import COEFFICIENTS
from paddle_dit.errors import ConfigError, ConversionError, DeployError
from paddle_dit.files import write_json

from .conftest import make_source, sign

PARTS = 2 * 3 * 2 * 3 + 2 + 2  # two modes, timesteps 999, 500 and 0, two outputs, three batch sizes; decoder; sample


class OneDnn:
    """Paddle Inference with its oneDNN kernels on, which give wrong numbers on Paddle 3.3."""

    def __new__(cls):
        from paddle_dit.deploy.paddle_backends import PaddleInference

        class Wrong(PaddleInference):
            def configure(self, stem, settings):
                config = super().configure(stem, settings)
                if stem.name != "decoder":  # which it cannot even open
                    config.enable_mkldnn()
                return config

        return Wrong()


def test_the_export_compared_every_part(exported):
    assert exported[1].count("ok,") == PARTS
    assert f"{PARTS} comparisons" in exported[1]


def test_an_engine_can_be_verified_again_later(exported, pipeline):
    told = []
    assert len(check(pipeline, load_reference(exported[0]), told.append)) == len(told) == PARTS


@pytest.mark.parametrize(
    ("program", "part"), [("cached_step", "step"), ("conditioning", "step"), ("decoder", "decoder")]
)
def test_a_weight_that_was_changed_and_signed_again_is_caught(engine, program, part):
    path = engine / "programs" / f"{program}.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: numpy_helper.to_array(tensor).size)
    values = numpy_helper.to_array(weight).copy()
    values.reshape(-1)[::7] *= 1.05
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    sign(engine)
    with pytest.raises(DeployError, match=f"worst {part}.*FAILED"):
        check(InferencePipeline.from_pretrained(engine), load_reference(engine))


def test_wrong_kernels_are_caught_and_no_engine_appears(source, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "paddle", (__name__, "OneDnn", "paddle"))
    with pytest.raises(DeployError, match="worst step"):
        export(source, "", tmp_path / "new" / "engine", "paddle", Settings(max_batch_size=2))
    assert list(tmp_path.iterdir()) == []


def test_a_sampler_update_that_is_off_is_caught(source):
    pipe, reference = build_pipeline(source, "dygraph"), make_reference(source, 2)
    check(pipe, reference)
    program = pipe.programs["cached_step"]
    run = program.run

    def without_noise(inputs, keep=False):
        return run({**inputs, "noise": 0 * inputs["noise"]}, keep=keep)

    program.run = without_noise
    failed = [figure.part for figure in compare(pipe, reference) if not figure.passed]
    assert failed
    assert all("update" in part for part in failed)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_step_that_leaves_out_a_coefficient_is_caught(source, name):
    pipe, reference = build_pipeline(source, "dygraph"), make_reference(source, 1)
    program = pipe.programs["cached_step"]
    run, left_out = program.run, np.array([other != name for other in COEFFICIENTS], np.float32)
    program.run = lambda inputs, keep=False: run(
        {**inputs, "coefficients": inputs["coefficients"] * left_out}, keep=keep
    )
    assert not all(figure.passed for figure in compare(pipe, reference))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("name", "part"), [("cached_step", "step"), ("decoder", "decoder")])
def test_a_program_whose_results_are_no_numbers_fails_by_name(source, name, part, precision):
    pipe, reference = build_pipeline(source, "dygraph"), make_reference(source, 1)
    pipe.info = replace(pipe.info, precision=precision)  # for its limits
    program = pipe.programs[name]
    run = program.run
    program.run = lambda inputs, keep=False: {
        output: value * float("nan") for output, value in run(inputs, keep=keep).items()
    }
    with pytest.raises(DeployError, match=f"worst {part}.* nan "):
        check(pipe, reference)


@pytest.mark.parametrize(
    "fields",
    [{"num_classes": 0}, {"class_dropout_prob": 0.0, "learn_sigma": False}, {"sample_size": (144, 8), "depth": 1}],
)
def test_every_kind_of_model_passes(fields, tmp_path):
    source = make_source(**fields)
    pipe = build_pipeline(source, "dygraph", settings=Settings(max_batch_size=1))
    assert check(pipe, make_reference(source, 1))


def test_half_precision_has_limits_of_its_own():
    assert Figure("", "relative L2", 0.01, 0.01).passed
    assert not Figure("", "PSNR", 29.9, 30.0).passed
    assert not Figure("", "max error", float("nan"), 1e-4).passed
    image = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr(image, image) == 100
    assert psnr(image, image + 1) == pytest.approx(48.13, abs=0.01)


def flipped(content):
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 255]) + content[len(content) // 2 + 1 :]


def array_file(array):
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"PK",
        lambda content: b"PK\x03\x04 and no zip",
        lambda content: content[:-100],
        flipped,
        lambda content: b"\x93NUMPY\x01\x00",
        lambda content: array_file(np.zeros(3)),
    ],
)
def test_a_damaged_reference_is_said(engine, damage):
    path = engine / "parity.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DeployError, match=r"parity\.npz") as refusal:
        load_reference(engine)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "sampler"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpm-solver++"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "ddim"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "ddim"),
        ({"_class_name": "DDPMScheduler", "trained_betas": None}, "ddpm"),
        ({"_class_name": "Other"}, "ddim"),
        ({"_class_name": ["DDPMScheduler"]}, "ddim"),
    ],
)
def test_the_sampler_is_the_one_of_the_pipelines_scheduler(tmp_path, values, sampler):
    assert sampler_of(tmp_path) == "ddim"
    (tmp_path / "scheduler").mkdir()
    write_json(tmp_path / "model_index.json", {})
    write_json(tmp_path / "scheduler" / "scheduler_config.json", {"beta_end": 0.02, **values})
    assert sampler_of(tmp_path) == sampler


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta_end", 0.012),
        ("beta_start", "0.0001"),
        ("beta_start", None),
        ("beta_end", [0.02]),
        ("trained_betas", [0.1]),
    ],
)
def test_a_scheduler_of_other_noise_is_refused(tmp_path, name, value):
    (tmp_path / "scheduler").mkdir()
    write_json(tmp_path / "model_index.json", {})
    write_json(tmp_path / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", name: value})
    with pytest.raises(ConversionError, match=name):
        sampler_of(tmp_path)


def test_a_model_in_memory_has_no_scheduler_in_the_working_folder(source, tmp_path, monkeypatch):
    (tmp_path / "scheduler").mkdir()
    write_json(tmp_path / "model_index.json", {})
    write_json(tmp_path / "scheduler" / "scheduler_config.json", {"_class_name": "DDPMScheduler"})
    monkeypatch.chdir(tmp_path)
    assert build_pipeline(source, "dygraph").info.sampling == {"sampler": "ddim"}


def test_a_model_that_is_being_trained_is_refused_and_goes_on():
    source = make_source(depth=1)
    source.model.train()
    with pytest.raises(ConfigError, match="training mode"):
        build_pipeline(source, "dygraph")
    assert source.model.training
