import shutil
from importlib.util import find_spec

import pytest

from paddle_dit.deploy.backends import Settings
from paddle_dit.deploy.paddle_tensorrt import HASHES, PaddleTensorRT
from paddle_dit.deploy.programs import build_layers
from paddle_dit.deploy.specs import DECODER, program_specs
from paddle_dit.errors import DeployError

SETTINGS = Settings(max_batch_size=1)


class WithoutGpu(PaddleTensorRT):
    """The backend where there is no GPU to be named."""

    def _key(self, stem, spec, settings):
        return "key"


class Copying(WithoutGpu):
    """The same with a compiler that copies, as TensorRT cannot be had here."""

    def __init__(self):
        self.conversions = 0

    def _compile(self, stem, spec, settings, target):
        self.conversions += 1
        for suffix in (".json", ".pdiparams"):
            shutil.copy(stem.with_name(stem.name + suffix), target.with_name(target.name + suffix))


@pytest.fixture(scope="module")
def spec(source):
    return program_specs(source.info.config, 1)[DECODER]


@pytest.fixture(scope="module")
def saved(source, spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "programs"
    folder.mkdir()
    PaddleTensorRT().save(build_layers(source.model, source.vae)[DECODER], spec, folder, DECODER, SETTINGS)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "programs")


def test_a_program_is_compiled_once_and_then_comes_from_the_cache(folder, spec):
    backend = Copying()
    for _ in range(2):
        backend.open(spec, folder, DECODER, SETTINGS)
        (folder.parent / "tensorrt" / "key" / "of_the_library").write_bytes(b"")
    assert backend.conversions == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: (cache / "decoder.pdiparams").write_bytes((cache / "decoder.pdiparams").read_bytes()[:-4]),
        lambda cache: (cache / "decoder.json").unlink(),
        lambda cache: (cache / HASHES).unlink(),
        lambda cache: (cache / HASHES).write_text("{"),
    ],
)
def test_compiled_files_that_were_changed_are_refused_with_the_mend(folder, spec, damage):
    Copying().open(spec, folder, DECODER, SETTINGS)
    cache = folder.parent / "tensorrt" / "key"
    damage(cache)
    with pytest.raises(DeployError, match="remove it") as refusal:
        Copying().open(spec, folder, DECODER, SETTINGS)
    assert "\n" not in str(refusal.value)
    shutil.rmtree(cache)
    Copying().open(spec, folder, DECODER, SETTINGS)


@pytest.mark.skipif(find_spec("paddle.tensorrt") is not None, reason="here the conversion may succeed")
def test_a_conversion_that_fails_is_one_line_and_leaves_nothing(folder, spec):
    with pytest.raises(DeployError, match=r"could not convert the program 'decoder'.*--backend paddle") as refusal:
        WithoutGpu().open(spec, folder, DECODER, SETTINGS)
    assert "\n" not in str(refusal.value)
    assert not (folder.parent / "tensorrt").exists()
