"""Where figures are written, and which drawn images are refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from paddle_dit.errors import ConfigError, DataError
from paddle_dit.evaluation import report
from paddle_dit.evaluation.job import open_named
from paddle_dit.evaluation.suite import Evaluation, Figure, Measured

from .test_images import write_folder

NETWORK = SimpleNamespace(about={"name": "a network", "weights": "0123", "resize": "none"})


def written(file, value, overwrite=False):
    found, samples = Evaluation({"fid": Figure("FID", value, "x")}), Measured(None, None, None, {"name": "x"})
    return report.write(file, found, samples, None, NETWORK, {}, overwrite)


def value_in(file):
    return json.loads(file.read_text())["figures"]["fid"]["value"]


@pytest.mark.parametrize("output", [None, "there/my.json"])
def test_evaluations_at_once_have_files_of_their_own(tmp_path, output):
    file = report.choose_file(tmp_path, output and tmp_path / output, overwrite=False)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda value: written(file, value), range(20)))
    assert [value_in(path) for path in files] == list(range(20))
    assert {path.name for path in files} == {file.name, *(f"{file.stem}-{number}.json" for number in range(2, 21))}
    assert sorted(file.parent.iterdir()) == sorted(files)


def test_an_earlier_file_is_replaced_where_that_is_asked_for(tmp_path):
    for value in (1, 2):
        assert written(report.choose_file(tmp_path, None, overwrite=True), value, True) == tmp_path / "metrics.json"
    assert value_in(tmp_path / "metrics.json") == 2
    with pytest.raises(ConfigError, match=r"metrics.json is there already; choose another --output"):
        report.choose_file(tmp_path, tmp_path / "metrics.json", overwrite=False)


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        written(tmp_path / "metrics.json", object())
    assert list(tmp_path.iterdir()) == []


MEND = "finish it with the same scripts/sample_ddp.py command, or move the images to a folder of their own"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"num_samples": 23}, "is unfinished, of 23 images: 23 are there"),
        ({"num_samples": 30}, "is unfinished, of 30 images: 23 are there"),
        ({"num_samples": 30, "complete": True}, "has other than the 30 images of its samples.json: 23 are there"),
        ({"num_samples": 20, "complete": True}, "has other than the 20 images of its samples.json: 23 are there"),
        ({"num_samples": 23, "complete": "no"}, "is unfinished"),
    ],
)
def test_an_unfinished_set_is_refused(tmp_path, record, told):
    folder = write_folder(tmp_path / "samples")
    np.savez(folder / "samples.npz", np.zeros((23, 8, 8, 3), np.uint8))
    (folder / "samples.json").write_text(json.dumps(record))
    for path in (folder, folder / "samples.npz"):
        with pytest.raises(DataError, match=f"{path} {told}.*; {MEND}"):
            open_named(path, "inception")


@pytest.mark.parametrize("record", ['{"num_samples": 23, "complete": true}', '{"seed": 3}', "{"])
def test_other_sets_are_taken(tmp_path, record):
    folder = write_folder(tmp_path / "samples")
    np.savez(folder / "samples.npz", np.zeros((23, 8, 8, 3), np.uint8))
    np.savez(folder / "others.npz", np.zeros((2, 8, 8, 3), np.uint8))
    (folder / "samples.json").write_text(record)
    (folder / "others.json").write_text('{"num_samples": 23}')  # whatever that means there
    counts = [len(open_named(path, "inception").images) for path in (folder, *sorted(folder.glob("*.npz")))]
    assert counts == [23, 2, 23]
