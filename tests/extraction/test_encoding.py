"""The encoder of an extraction: its precision, and a scaling factor that is not the VAE's own."""

import numpy as np
import pytest

from paddle_dit.data.digits import DIGITS_VAE_FOLDER
from paddle_dit.data.store import PackedStore
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.extraction.encoding import Encoder
from paddle_dit.extraction.job import Extraction
from paddle_dit.extraction.options import ExtractionOptions
from paddle_dit.extraction.summary import PREVIEW, figure_lines
from paddle_dit.meeting import StoppedError
from paddle_dit.models.vae import load_vae
from tests.digit_images import SIZE, write_digit_images
from tests.half_precision import overflow_in, use_float16_weights

OWN = 0.9859727621078491
PIXELS = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write digits as PNG files, a folder for each class."""
    return write_digit_images(tmp_path_factory.mktemp("images") / "digits", 20, numbered=False)


def extract(images, folder, stop=lambda: False, **values):
    values = {"image_size": SIZE, "batch_size": 8, "shard_size": 8, "num_workers": 0, "dtype": "float32", **values}
    options = ExtractionOptions(data_path=images, features_path=folder, vae=str(DIGITS_VAE_FOLDER), **values)
    with Extraction(options, report=lambda line: None) as job:
        job.begin()
        return job.run(stop=stop)


def everything(store):
    return store.gather(np.arange(len(store)))[0]


@pytest.mark.parametrize("kind", ["latents", "moments"])
def test_what_float16_cannot_hold_is_encoded_in_float32_and_said_once(monkeypatch, kind):
    said, vae = [], load_vae(DIGITS_VAE_FOLDER)
    use_float16_weights(monkeypatch, lambda: vae)
    narrow, wide = (Encoder(vae, SIZE, kind, precision=name, report=said.append) for name in ("fp16", "fp32"))
    assert 0 < np.abs(narrow(PIXELS, [0, 1]) - wide(PIXELS, [0, 1])).max() < 0.1
    assert said == []
    overflow_in(vae.quant_conv.bias)
    for _ in range(2):
        np.testing.assert_array_equal(narrow(PIXELS, [0, 1]), wide(PIXELS, [0, 1]))
    assert said == ["fp16 overflows in this VAE: such batches are computed in float32; bf16 has float32's range"]


def test_another_scaling_factor_is_used_and_recorded_beside_the_vaes_own(images, tmp_path):
    plain, half = (extract(images, tmp_path / str(factor), scaling_factor=factor) for factor in (None, OWN / 2))
    np.testing.assert_allclose(everything(half.store), everything(plain.store) / 2, rtol=1e-6)
    record = {"name": str(DIGITS_VAE_FOLDER), "scaling_factor": OWN, "image_size": SIZE}
    assert plain.store.vae == record
    assert half.store.vae == record | {"scaling_factor": OWN / 2, "config_scaling_factor": OWN}
    shown = [(tmp_path / name / PREVIEW).read_bytes() for name in ("None", str(OWN / 2))]
    assert shown[0] == shown[1]
    same = extract(images, tmp_path / "same", scaling_factor=OWN)
    assert same.store.index == plain.store.index


def test_moments_are_as_they_are_and_say_the_factor_for_latents(images, tmp_path):
    plain, half = (
        extract(images, tmp_path / str(factor), store="moments", scaling_factor=factor) for factor in (None, OWN / 2)
    )
    np.testing.assert_array_equal(everything(half.store), everything(plain.store))
    assert half.store.vae["scaling_factor"] == OWN / 2


@pytest.mark.parametrize("kind", ["latents", "moments"])
def test_a_scaling_factor_that_does_not_fit_is_warned_about_with_one_that_would(images, tmp_path, kind):
    lines = figure_lines(*vars(extract(images, tmp_path / "store", store=kind, scaling_factor=10.0)).values())
    warning = next(line for line in lines if line.startswith("warning: the VAE's scaling factor is 10, but"))
    assert warning.endswith("--scaling-factor sets another")
    implied = float(warning.split("deviation 1 at ")[1].split(":")[0])
    assert implied == pytest.approx(OWN, rel=0.3)
    lines = figure_lines(*vars(extract(images, tmp_path / "other", store=kind, scaling_factor=implied)).values())
    assert not any(line.startswith("warning") for line in lines)


def test_another_scaling_factor_is_another_job(images, tmp_path):
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        extract(images, tmp_path / "store", stop=lambda: next(asked))
    with pytest.raises(DataError, match=r"scaling_factor was 0\.98.*, now 0\.5"):
        extract(images, tmp_path / "store", scaling_factor=0.5)
    extract(images, tmp_path / "store")
    with pytest.raises(DataError, match="already holds a store, of another vae; choose another folder"):
        extract(images, tmp_path / "store", scaling_factor=0.5)
    assert PackedStore(tmp_path / "store").vae["scaling_factor"] == OWN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.0}, "--scaling-factor must be above 0 and at most 1,000,000, got 0.0"),
        ({"scaling_factor": float("nan")}, "--scaling-factor must be above 0 and at most 1,000,000, got nan"),
        ({"scaling_factor": 0.5, "format": "npy"}, "npy pairs do not say .*; use --format packed with --scaling-fac"),
    ],
)
def test_a_factor_that_cannot_be_used_is_refused_before_anything_is_written(images, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        extract(images, tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()
