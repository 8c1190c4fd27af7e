from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from paddle_dit.deploy import onnx_runtime, specs
from paddle_dit.deploy.backends import BACKENDS, Settings, explained, find_backend, open_programs, plain_backend
from paddle_dit.deploy.engine import EngineInfo
from paddle_dit.deploy.export import build_pipeline, build_programs
from paddle_dit.deploy.onnx_runtime import OnnxRuntime
from paddle_dit.deploy.pipeline import InferencePipeline
from paddle_dit.deploy.predictor import as_predictor
from paddle_dit.deploy.specs import MODEL, program_specs
from paddle_dit.diffusion.options import SamplingOptions
from paddle_dit.errors import ConfigError, DeployError
from paddle_dit.generation import generate_latents
from paddle_dit.runtime import has_gpu

from .conftest import MAX_BATCH_SIZE, sign

OPTIONS = SamplingOptions("ddpm", 4, 2.0, seed=3)
needs_no_gpu = pytest.mark.skipif(has_gpu(), reason="what is refused without a GPU")


@pytest.fixture(scope="module")
def wanted(source):
    return generate_latents(source.model, [1, 2, 3], OPTIONS)


def assert_equal(drawn, wanted):
    np.testing.assert_allclose(drawn, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["static", "paddle"])
def test_every_backend_draws_the_same(source, wanted, name, tmp_path):
    pipe = build_pipeline(source, name, settings=Settings(max_batch_size=3), folder=tmp_path)
    assert_equal(pipe.draw_latents([1, 2, 3], OPTIONS), wanted)
    np.testing.assert_allclose(pipe.decode(wanted), build_pipeline(source, "dygraph").decode(wanted), atol=1)


def test_a_program_draws_in_the_place_of_a_model(source, wanted):
    programs = build_programs(source, "static", (MODEL,), Settings())
    assert_equal(generate_latents(as_predictor(programs[MODEL], source.info.config), [1, 2, 3], OPTIONS), wanted)


class OnTheCpu(OnnxRuntime):
    """What a GPU replays, with the CPU's kernels."""

    def providers(self, settings, spec, cache=None):
        return [("CPUExecutionProvider", {})]


@pytest.fixture
def replayed(exported, pipeline, monkeypatch):
    """Return the engine with fixed addresses, whose tables have room for four steps of three classes."""
    monkeypatch.setattr(specs, "TABLE_BYTES", 4 * 3 * 4 * specs.modulation_width(pipeline.info.config))
    needed, settings = specs.program_specs(pipeline.info.config, MAX_BATCH_SIZE), Settings(cuda_graph=True)
    folder = exported[0] / "programs"
    programs = {name: OnTheCpu().open(needed[name], folder, name, settings) for name in pipeline.programs}
    return InferencePipeline(pipeline.info, programs)


def test_fixed_addresses_give_the_same(replayed, pipeline):
    calls = [(labels, replace(OPTIONS, seed=seed)) for seed, labels in enumerate([[1, 2, 3], [4], [5, 6], [7, 7, 8]])]
    wanted = [pipeline.draw_latents(*call) for call in calls]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda call: replayed.draw_latents(*call), calls * 4))
    for found, one in zip(together, wanted * 4, strict=True):
        np.testing.assert_array_equal(found, one)
    pixels = replayed.decode(wanted[0])
    np.testing.assert_array_equal(pixels, pipeline.decode(wanted[0]))


def test_a_step_is_captured_once_for_each_batch_size_with_and_without_guidance(replayed):
    for steps in range(1, 8):
        options = SamplingOptions("ddim", steps, 2.0, guidance_interval=(300, 700))
        for labels in ([1], [2, 2], [3, 4], [5, 6, 7], [8, 8, 9]):
            replayed.draw_latents(labels, options)
    assert len(replayed.programs["cached_step"]._captured) == 2 * MAX_BATCH_SIZE


@pytest.mark.skipif(onnxruntime.__version__.startswith("1.23."), reason="which copies from the host alone")
def test_values_stay_on_the_device_and_a_table_is_copied_once(replayed, monkeypatch):
    width, copied = specs.modulation_width(replayed.info.config), []
    fetched, numpy, copy = [], onnxruntime.OrtValue.numpy, onnx_runtime.copy_into
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda value: fetched.append(value.shape()) or numpy(value))
    monkeypatch.setattr(
        onnx_runtime, "copy_into", lambda target, value: copied.append(target.shape()[-1]) or copy(target, value)
    )
    replayed.draw_latents([1, 2], SamplingOptions("ddpm", 8, 2.0))
    assert fetched == [[2, 4, 8, 8]] * 2  # the last step's outputs
    assert copied.count(width) == 2  # each for four steps


def test_an_unknown_backend_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'onnxruntime'"):
        find_backend("onnxrutime")


def test_a_backend_that_is_not_installed_is_named_with_the_mend(monkeypatch):
    monkeypatch.setitem(BACKENDS, "onnxruntime", ("paddle_dit.deploy.absent", "Absent", "onnxruntime"))
    with pytest.raises(DeployError, match=r"pip install onnxruntime of the version in requirements\.txt"):
        find_backend("onnxruntime")


@needs_no_gpu
@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("paddle-tensorrt", {"devices": ("gpu:0",)}, "no TensorRT"),
        ("onnxruntime-tensorrt", {"devices": ("gpu:0",)}, "TensorrtExecutionProvider"),
        ("onnxruntime-tensorrt", {}, "--device gpu:0"),
        ("onnxruntime", {"devices": ("gpu:0",)}, "CUDAExecutionProvider"),
        ("onnxruntime", {"precision": "bf16"}, "fp16"),
        ("onnxruntime", {"cuda_graph": True}, "--cuda-graph"),
        ("paddle", {"devices": ("gpu:0",)}, "no GPU"),
        ("paddle", {"precision": "fp16"}, "use fp32"),
        ("paddle", {"cuda_graph": True}, "--cuda-graph"),
        ("static", {"precision": "bf16"}, "export an engine"),
    ],
)
def test_what_cannot_run_here_is_refused_in_one_line(name, settings, said):
    with pytest.raises((ConfigError, DeployError), match=said) as refusal:
        find_backend(name).check(Settings(**settings))
    assert "\n" not in str(refusal.value)
    # What may also be said when an engine is opened, by a command that has no such flags.
    assert "take --" not in str(refusal.value) or refusal.type is ConfigError


def test_a_file_that_this_version_cannot_open_is_said_with_the_mend(engine):
    path = engine / "programs" / "decoder.onnx"
    model = onnx.load(path)
    model.ir_version = 99  # of a later ONNX Runtime
    onnx.save(model, path)
    sign(engine)
    with pytest.raises(DeployError, match=rf"Runtime {onnxruntime.__version__} .*99.*deploy\.json names") as refusal:
        InferencePipeline.from_pretrained(engine)
    assert "\n" not in str(refusal.value)


@needs_no_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-tensorrt"])
def test_no_session_runs_on_another_device_than_asked_for(exported, name):
    spec = program_specs(EngineInfo.load(exported[0]).config, MAX_BATCH_SIZE)["decoder"]
    with pytest.raises(DeployError, match=r"ExecutionProvider.*--device cpu") as refusal:
        find_backend(name).open(spec, exported[0] / "programs", "decoder", Settings(devices=("gpu:0",)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "plain", "precision"),
    [
        ("onnxruntime-tensorrt", "onnxruntime", "fp16"),  # which is in its files
        ("onnxruntime", "onnxruntime", "fp16"),
        ("paddle-tensorrt", "paddle", "fp32"),
    ],
)
def test_the_plain_backend_is_of_the_same_kind_on_the_cpu(name, plain, precision):
    settings = Settings("fp16", 3, devices=("gpu:0",), cuda_graph=True, threads=2)
    assert plain_backend(name, settings) == (plain, Settings(precision, 3, threads=2))
    assert plain_backend(plain, Settings()) == (plain, Settings())


def test_paddles_programs_are_for_the_version_that_wrote_them(tmp_path):
    with pytest.raises(DeployError, match=r"paddle 3\.0\.0 \(here"):
        open_programs("paddle", {"paddle": "3.0.0"}, {}, tmp_path, Settings())
    backend, _ = open_programs("onnxruntime", {"onnxruntime": "1.20.0"}, {}, tmp_path, Settings())
    assert backend.name == "onnxruntime"


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "int8"},
        {"max_batch_size": 0},
        {"max_batch_size": 2.5},
        {"threads": 0},
        {"threads": -1},
        {"devices": ("gpu:0", "gpu:1")},
        *({"devices": (device,)} for device in ("gpu:x", "gpu", "CPU", "cpu:0", "cuda:0", "", None)),
        {"cuda_graph": "no"},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings)).removesuffix("s")):
        Settings(**settings)


def test_a_device_has_a_number():
    assert [Settings(devices=(device,)).device_number for device in ("cpu", "gpu:0", "gpu:12")] == [0, 0, 12]


def test_programs_in_memory_replay_no_graphs(source):
    with pytest.raises(ConfigError, match="CUDA graph"):
        build_pipeline(source, "static", settings=Settings(devices=("cpu",), cuda_graph=True))


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), RuntimeError("Failed to allocate memory for requested buffer of size 9")]
)
def test_too_little_memory_is_said_with_the_mend(error):
    with pytest.raises(DeployError, match="--batch-size"), explained():
        raise error


def test_other_errors_of_a_backend_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), explained():
        raise RuntimeError("something else")
