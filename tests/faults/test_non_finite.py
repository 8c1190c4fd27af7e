"""NaN in the loss or in the gradients of one rank of two: no rank's weights ever see it."""

import json

import numpy as np
import pytest

from paddle_dit.checkpoint import newest_checkpoint
from tests.faults.runs import TRAIN, TRAINER, checkpoints, flags_of, losses, run, wrapped
from tests.faults.test_signals import RANK_0_ENDS_LAST

pytestmark = pytest.mark.distributed
BAD_STEP = 3  # from 0
IN_THE_LOSS = """
from paddle_dit.diffusion.objective import GaussianDiffusion
calls, losses = [], GaussianDiffusion.training_losses
def spoiled(*inputs):
    calls.append(1)
    found = losses(*inputs)
    if len(calls) == 4 and os.environ["PADDLE_TRAINER_ID"] == "1":
        found["loss"] = found["loss"] * float("nan")
    return found
GaussianDiffusion.training_losses = spoiled
"""
IN_A_GRADIENT = """
from paddle_dit.training.data_parallel import DataParallel
calls, reduce = [], DataParallel.reduce_gradients
def spoiled(parallel, parameters):
    calls.append(1)
    if len(calls) == 4 and os.environ["PADDLE_TRAINER_ID"] == "1":
        gradient = parameters[-1].grad
        gradient.set_value(gradient * float("nan"))
    return reduce(parallel, parameters)
DataParallel.reduce_gradients = spoiled
"""
WEIGHTS_OF_EACH_RANK = """
import numpy as np
from paddle_dit.training.session import Session
run = Session.run
def kept(session, loop):
    run(session, loop)
    weights = {name: value.numpy() for name, value in session.model.state_dict().items()}
    np.savez(os.path.join(session.recipe.output_dir, f"rank-{session.ranks.rank}"), **weights)
Session.run = kept
"""
CASES = [
    pytest.param(TRAIN, IN_THE_LOSS, "loss", id="train.py-loss"),
    pytest.param(TRAINER, IN_A_GRADIENT, "gradient", id="trainer-gradient", marks=pytest.mark.slow),
    pytest.param(TRAIN, IN_A_GRADIENT, "gradient", id="train.py-gradient", marks=pytest.mark.slow),
    pytest.param(TRAINER, IN_THE_LOSS, "loss", id="trainer-loss", marks=pytest.mark.slow),
]


def errors_of_ranks(log):
    """Return the lines that begin with "error:" in the log of each rank."""
    logs = [log.with_name(f"{log.name}-ranks") / f"workerlog.{rank}" for rank in range(2)]
    return [[line for line in path.read_text().splitlines() if line.startswith("error:")] for path in logs]


@pytest.mark.slow
def test_a_rank_that_ends_later_than_another_says_so_too(store, tmp_path):
    folder = tmp_path / "run"
    flags = flags_of(TRAIN, store, folder, 2, max_steps=6)
    script = wrapped(tmp_path, TRAIN, IN_THE_LOSS + RANK_0_ENDS_LAST)
    code, text = run(script, 2, *flags, log=tmp_path / "log")
    assert code == 2, text
    assert [len(lines) for lines in errors_of_ranks(tmp_path / "log")] == [1, 1]


@pytest.mark.parametrize(("script", "change", "what"), CASES)
def test_it_stops_all_ranks_and_the_last_checkpoint_is_whole_and_finite(store, tmp_path, script, change, what):
    folder = tmp_path / "run"
    flags = flags_of(script, store, folder, 2, max_steps=6, ckpt_every=1)
    code, text = run(wrapped(tmp_path, script, change), 2, *flags, log=tmp_path / "log")
    assert code == 2, text
    assert "Traceback" not in text
    first, second = errors_of_ranks(tmp_path / "log")
    assert len(first) == len(second) == 1
    assert first == second
    assert f"the {what} is not finite at step {BAD_STEP}" in first[0]
    assert (", samples " in first[0]) == (what == "loss")
    assert checkpoints(folder) == list(range(1, BAD_STEP + 1))
    kept = newest_checkpoint(folder, lambda line: pytest.fail(line))
    for kind in ("model", "ema", "optimizer"):
        for name, value in kept.tensors(kind).items():
            assert np.isfinite(value).all(), name
    assert np.isfinite(list(losses(folder).values())).all()


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRAIN, TRAINER])
@pytest.mark.parametrize(("change", "what"), [(IN_THE_LOSS, "loss"), (IN_A_GRADIENT, "gradient")])
def test_one_that_is_allowed_is_skipped_and_the_ranks_stay_equal(store, tmp_path, script, change, what):
    folder = tmp_path / "run"
    flags = flags_of(script, store, folder, 2, max_steps=6, ckpt_every=1, max_skipped_steps=1)
    code, text = run(wrapped(tmp_path, script, change + WEIGHTS_OF_EACH_RANK), 2, *flags, log=tmp_path / "log")
    assert code == 0, text
    assert f"the {what} is not finite at step {BAD_STEP}" in text
    assert "skipped (1 of 1)" in text
    assert checkpoints(folder) == list(range(1, 7))
    assert json.loads((folder / "checkpoint-6" / "state.json").read_text())["skipped_steps"] == 1
    first, second = (dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(2))
    saved = newest_checkpoint(folder).tensors("model")
    assert first.keys() == second.keys() == saved.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
        assert np.isfinite(value).all()
