"""What tests of training on the digits' images, and on what is extracted from them, share."""

import sys

import pytest

import train
import train_image_generation_dit_trainer as trainer
from tests.digit_images import write_digit_images
from tests.faults.runs import TRAINER


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_digit_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs a script's ``main`` in this process and gives its exit code, output and errors."""

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            (trainer if script == TRAINER else train).main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call
