"""Many images: their classes, and the same folder whoever drew it and however often it was stopped."""

import json
import os

import numpy as np
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.errors import ConfigError, DataError, GenerationError
from paddle_dit.generation import SamplingOptions, draw_images, load_generator
from paddle_dit.meeting import Place, StoppedError
from paddle_dit.sampling.many import ManyImages, labels_of
from paddle_dit.sampling.options import ManyOptions

from ..scripts.test_sample import make_run

COUNT, BATCH = 11, 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), DiTConfig.from_preset("DiT-Digits/2"))


def options(run_folder, folder, **values):
    small = {"sampler": "ddim", "num_inference_steps": 2, "num_fid_samples": COUNT, "per_proc_batch_size": BATCH}
    return ManyOptions(ckpt=run_folder, sample_dir=folder, **{**small, **values})


def draw(run_folder, folder, stop=lambda: False, advance=lambda amount: None, place=None, **values):
    with ManyImages(options(run_folder, folder, **values), place, report=lambda line: None) as job:
        job.begin()
        job.run(advance, stop)
        return job


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(steps):
    calls = iter(range(10**6))
    return lambda: next(calls) >= steps


def test_the_images_are_those_of_the_seed(run_folder, tmp_path):
    advanced = []
    draw(run_folder, tmp_path / "set", advance=advanced.append)
    assert sum(advanced) == pytest.approx(COUNT)
    with np.load(tmp_path / "set" / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    np.testing.assert_array_equal(labels, labels_of(COUNT, DiTConfig(num_classes=10), "uniform", 0))
    sampling = SamplingOptions("ddim", 2, 1.5)
    drawn = draw_images(load_generator(run_folder), labels, sampling, batch_size=BATCH)
    np.testing.assert_array_equal(images, drawn)
    record = json.loads((tmp_path / "set" / "samples.json").read_text())
    assert (record["num_samples"], record["labels"], record["guidance_scale"]) == (COUNT, "uniform", 1.5)
    assert record["environment"]["threads"] == os.environ["OMP_NUM_THREADS"]


@pytest.mark.parametrize("steps", [0, 3, 5])
def test_a_stop_costs_the_present_batch_alone(run_folder, tmp_path, steps):
    draw(run_folder, tmp_path / "whole")
    with pytest.raises(StoppedError):
        draw(run_folder, tmp_path / "set", stop=stop_after(steps))
    advanced = []
    job = draw(run_folder, tmp_path / "set", advance=advanced.append)
    assert job.done == {0: 0, 3: BATCH, 5: BATCH}[steps]  # two steps a batch, and it is asked before each batch as well
    assert sum(advanced) == pytest.approx(COUNT - job.done)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_whole_set_is_not_drawn_again(run_folder, tmp_path):
    draw(run_folder, tmp_path / "set")
    before = contents(tmp_path / "set")
    (tmp_path / "set" / ".parts").mkdir()  # as a kill just before the end leaves it
    job = draw(run_folder, tmp_path / "set", stop=lambda: pytest.fail("nothing is to be drawn"))
    assert job.done == COUNT
    assert contents(tmp_path / "set") == before


def test_a_second_process_group_is_refused(run_folder, tmp_path):
    with ManyImages(options(run_folder, tmp_path / "set")) as first:
        first.begin()
        with pytest.raises(ConfigError, match=r"--sample-dir .* is in use by process"):
            draw(run_folder, tmp_path / "set")


def test_another_rank_takes_other_batches_and_rank_0_finishes(run_folder, tmp_path):
    draw(run_folder, tmp_path / "whole")
    with ManyImages(options(run_folder, tmp_path / "set"), Place(0, 2, "a")) as main:
        main.begin()
        other = draw(run_folder, tmp_path / "set", place=Place(1, 2, "a"))
        assert not other.is_main
        assert [number for number, _ in main.work.sidecars()] == [1]
        main.run()
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"labels": "balanced"}, "labels was 'uniform', now 'balanced'"),
        ({"guidance_scale": 2.0}, "guidance_scale was 1.5, now 2.0"),
        ({"num_fid_samples": 12}, "num_samples was 11, now 12"),
    ],
)
def test_a_folder_of_other_settings_is_refused(run_folder, tmp_path, change, told):
    draw(run_folder, tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(DataError, match=told):
        draw(run_folder, tmp_path / "set", **change)
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize("change", [{"guidance_scale": 0.5}, {"guidance_channels": 9}, {"guidance_interval": (5, 5)}])
def test_guidance_that_cannot_be_is_refused_before_the_folder_is_claimed(run_folder, tmp_path, change):
    with pytest.raises(ConfigError, match="guidance_"):
        draw(run_folder, tmp_path / "set", **change)
    assert not (tmp_path / "set").exists()


def test_images_that_come_out_infinite_are_an_error_and_not_black(run_folder, tmp_path):
    with pytest.raises(GenerationError, match=r"came out NaN or infinite; its latents reach .*e\+37.* lower the guid"):
        draw(run_folder, tmp_path / "set", guidance_scale=1e38)
    assert not list((tmp_path / "set").glob("*.png"))


def test_classes_are_uniform_and_do_not_depend_on_how_many_are_drawn():
    config = DiTConfig(num_classes=1000)
    labels = labels_of(50_000, config, "uniform", 0)
    counts = np.bincount(labels, minlength=1000)
    assert len(counts) == 1000
    chi_squared = ((counts - 50) ** 2 / 50).sum()
    assert 999 - 5 * 45 < chi_squared < 999 + 5 * 45  # its mean and five deviations
    np.testing.assert_array_equal(labels_of(100, config, "uniform", 0), labels[:100])
    assert (labels_of(100, config, "uniform", 1) != labels[:100]).mean() > 0.9


def test_balanced_classes_take_turns():
    labels = labels_of(25, DiTConfig(num_classes=10), "balanced", 0)
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_an_unconditional_model_has_its_null_class_alone():
    assert labels_of(3, DiTConfig(num_classes=0), "uniform", 0).tolist() == [0, 0, 0]
