"""The golden arrays cover the forward pass, guidance, schedule, losses, gradients, training steps and samplers."""

import numpy as np
import pytest

from paddle_dit.errors import PaddleDiTError
from paddle_dit.evaluation.parity import compare, relative

from ..conftest import GOLDEN

GROUPS = {
    "position table", "forward", "cfg", "schedule", "respacing", "loss", "grad_norm (31 parameters)", "train",
    "ddpm50", "ddpm250", "ddim50",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return list(compare(GOLDEN / "dit_tiny.npz"))


def test_every_group_is_compared(rows):
    assert {row.name.split("/")[0] for row in rows} == GROUPS
    assert len(rows) == 30


def test_every_array_agrees_with_the_reference(rows):
    failed = [(row.name, row.error, row.tolerance) for row in rows if not row.passes]
    assert not failed


def test_a_wrong_array_is_found(tmp_path):
    with np.load(GOLDEN / "dit_tiny.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key.split("/")[0] in ("config", "weights", "forward")}
    arrays["weights/blocks.1.mlp.fc2.bias"] = arrays["weights/blocks.1.mlp.fc2.bias"] + 1e-3
    np.savez(tmp_path / "wrong.npz", **arrays)
    failed = {row.name for row in compare(tmp_path / "wrong.npz") if not row.passes}
    assert failed == {"forward/out", "forward/out_null"}


def test_non_finite_values_fail():
    assert not relative("x", [np.nan], [1.0], 1.0).passes


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "text.npz"
    path.write_text("hello")
    with pytest.raises(PaddleDiTError, match=r"no \.npz"):
        list(compare(path))
