"""A record of images, also one that a stranger wrote, becomes options or one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_dit.errors import ConfigError
from paddle_dit.sampling.again import parse_sample

from ..faults.test_fuzz_commands import JSON

RECORD = {
    "model": "results/checkpoint-5",
    "weights": "model",
    "vae": None,
    "sampler": "ddim",
    "num_inference_steps": 25,
    "timestep_spacing": "trailing",
    "eta": 0.25,
    "guidance_scale": 2.5,
    "guidance_channels": 4,
    "guidance_interval": [100, 900],
    "seed": 7,
    "precision": "fp32",
    "batch_size": 3,
    "first_index": 12,
    "class_labels": [2, 0, 5],
    "weights_sha256": "0" * 64,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("record") / "samples.json"


def again(path, record, *argv):
    path.write_text(json.dumps(record))
    return parse_sample(["--again", str(path), *argv], description="")


def test_every_option_comes_from_the_record(path):
    options, record = again(path, RECORD)
    assert record == RECORD
    assert str(options.path) == RECORD["model"]
    assert options.class_labels == ("2", "0", "5")
    for name in RECORD.keys() - {"model", "class_labels", "guidance_interval", "weights_sha256"}:
        assert getattr(options, name) == RECORD[name], name
    assert options.guidance_interval == (100, 900)


def test_the_command_line_wins(path):
    options, _ = again(path, RECORD, "--ckpt", "moved", "--seed", "8", "--class-labels", "1")
    assert (str(options.path), options.seed, options.class_labels) == ("moved", 8, ("1",))


def test_without_a_record_there_is_none():
    options, record = parse_sample(["--ckpt", "results"], description="")
    assert (record, options.again) == ({}, None)


def test_a_record_of_a_whole_set_asks_for_one_of_its_images(path):
    record = {key: value for key, value in RECORD.items() if key != "class_labels"}
    with pytest.raises(ConfigError, match="does not say which classes were drawn; give a PNG of those images"):
        again(path, record)


@given(st.sampled_from(sorted(RECORD)), JSON)
def test_any_record_is_read_or_refused_in_one_line(path, name, value):
    try:
        options, _ = again(path, {**RECORD, name: value})
    except ConfigError:
        return
    assert options.overwrite is False
    assert options.output is None
