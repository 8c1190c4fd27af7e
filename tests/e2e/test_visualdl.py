"""What a person sees of a run: the real VisualDL server in a real browser."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from paddle_dit.config import PRESETS, DiTConfig, ModelInfo
from paddle_dit.data.digits import DIGIT_NAMES
from paddle_dit.models.dit import DiT
from paddle_dit.pictures import BACKGROUND
from paddle_dit.training.monitor import Monitor
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.sampling_preview import PreviewOptions, SamplingPreview

TAGS = ["samples/training latents", "samples/cfg 1.0", "samples/cfg 4.0"]
STEPS = (1000, 2000)
LOSSES = {step: 1.0 / step for step in range(100, 2100, 100)}
CURVE = (41, 50, 225)  # the colour of VisualDL's first run
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def grids():
    """Images that the previews handed to VisualDL: tag and step -> array."""
    return {}


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory, grids):
    """Record a run's figures and previews as training does, and return its VisualDL folder."""
    config = DiTConfig(**PRESETS["DiT-Digits/2"])
    info = ModelInfo(config, DIGIT_NAMES, {"name": "data/digits_vae"})
    random, model, folder = np.random.default_rng(0), DiT(config), tmp_path_factory.mktemp("run")
    others = dict.fromkeys(
        ("images_per_second", "images_per_second_per_card", "tflops_per_card", "data_wait", "peak_memory_mib"), 1.0
    )
    with Monitor(folder, total_steps=2000, start_step=0, visualdl=folder / "visualdl") as monitor:

        def add_image(tag, image, step):
            grids[tag, step] = image.copy()
            monitor.add_image(tag, image, step)

        preview = SamplingPreview(info, PreviewOptions(num_inference_steps=4), Ranks(), folder, add_image)
        preview.reconstruct(random.standard_normal((8, 4, 8, 8)).astype(np.float32), range(8))
        for step, loss in LOSSES.items():
            monitor.record(step, {"loss": loss, **others})
            if step in STEPS:
                for weight in model.parameters():
                    weight.set_value(0.05 * random.standard_normal(weight.shape).astype(np.float32))
                preview.draw(model, step)
    return folder / "visualdl"


@pytest.fixture(scope="module")
def server(log_folder, tmp_path_factory):
    """Start VisualDL on the log folder and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path_factory.mktemp("server") / "output"
    command = [sys.executable, "-m", "visualdl.server.app", "--logdir", log_folder, "--disable-telemetry"]
    with output.open("wb") as file:
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=file, stderr=file)
    address, end = f"http://127.0.0.1:{port}/app", time.monotonic() + 60
    try:
        while True:
            try:
                if ask(address, "image/tags")["tags"] and ask(address, "scalar/tags")["tags"]:
                    break
            except (OSError, TypeError):  # not listening, or has not read the logs yet
                pass
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def fetch(address, path, **parameters):
    url = f"{address}/api/{path}?{urllib.parse.urlencode(parameters)}"
    # Without a language VisualDL answers with an error.
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept-Language": "en"}), timeout=20) as answer:
        return answer.read()


def ask(address, path, **parameters):
    return json.loads(fetch(address, path, **parameters))["data"]


@pytest.fixture
def browse(server, tmp_path):
    """Return a function that opens a page and gives its DOM and screenshot, once ``ready(dom)`` or after three tries.

    PADDLE_DIT_SCREENSHOTS names a folder to keep the screenshots in.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium here; .ci/run installs Debian's")
    pictures = Path(os.environ.get("PADDLE_DIT_SCREENSHOTS", tmp_path))
    pictures.mkdir(parents=True, exist_ok=True)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--lang=en"]
    flags += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]

    def open_page(page, ready):
        picture = pictures / f"{page.replace('/', '-')}.png"
        for budget in (10_000, 30_000, 60_000):  # milliseconds of the page's own time
            taken = [f"--virtual-time-budget={budget}", "--window-size=1280,1100", f"--screenshot={picture}"]
            command = [CHROMIUM, *flags, *taken, "--dump-dom", f"{server}/{page}"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert result.returncode == 0, result.stderr
            if ready(result.stdout):
                break
        return result.stdout, np.asarray(Image.open(picture).convert("RGB")).astype(int)

    return open_page


def test_the_server_hands_out_what_was_recorded(server, grids):
    [run] = ask(server, "runs")
    [tags] = ask(server, "image/tags")["tags"]
    assert tags == TAGS
    for tag in tags:
        steps = [entry["step"] for entry in ask(server, "image/list", run=run, tag=tag)]
        assert steps == ([0] if tag == TAGS[0] else list(STEPS))
        for index, step in enumerate(steps):
            image = Image.open(io.BytesIO(fetch(server, "image/image", run=run, tag=tag, index=index)))
            np.testing.assert_array_equal(np.asarray(image), grids.get((tag, step)))
    points = ask(server, "scalar/list", run=run, tag="train/loss")
    assert {step: loss for _, step, loss in points} == pytest.approx(LOSSES)


def test_the_image_page_shows_the_grids(browse, grids):
    dom, picture = browse("sample/image", lambda dom: dom.count('src="blob:') >= len(TAGS))
    for tag in TAGS:
        assert f">{tag}<" in dom
    # The grids have a background that nothing else on the page has. The page opens at the first step of each tag.
    regions, _ = ndimage.label(np.abs(picture - BACKGROUND).max(axis=2) <= 2)
    places = [place for place in ndimage.find_objects(regions) if picture[place][..., 0].size > 10_000]
    shown = [picture[place] for place in places]
    recorded = [grids[tag, step] for tag, step in zip(TAGS, (0, STEPS[0], STEPS[0]), strict=True)]
    assert len(shown) == len(recorded)
    differences = np.array([[difference(one, grid) for grid in recorded] for one in shown])
    assert differences.argmin(axis=1).tolist() == [0, 1, 2]
    assert differences.diagonal().max() < 12, differences


def difference(shown, grid):
    """Return the mean difference in levels between a region of the screenshot and a grid, scaled to it."""
    height, width, _ = shown.shape
    return np.abs(np.asarray(Image.fromarray(grid).resize((width, height))) - shown).mean()


def test_the_scalar_page_shows_the_loss(browse, server):
    [tags] = ask(server, "scalar/tags")["tags"]
    assert tags[0] == "train/loss"
    dom, picture = browse("scalar", lambda dom: dom.count("<canvas") >= len(tags))
    assert dom.count("<canvas") == len(tags)
    # Charts, their titles too, are drawn pixel by pixel. The loss is the first, and it alone falls.
    first, second = (fall(picture[240:480, left : left + 390]) for left in (60, 510))
    assert first > 100
    assert second == 0


def fall(chart):
    """Return by how many pixels the curve in a chart is lower at its right end than at its left end."""
    rows, columns = np.nonzero(np.abs(chart - CURVE).max(axis=2) < 16)
    assert columns.max() - columns.min() > 250, "there is no curve across the chart"
    return rows[columns == columns.max()].min() - rows[columns == columns.min()].min()
