"""scripts/pack_features.py as a process: what it says, what it leaves, and one line for what cannot be packed."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from paddle_dit.data.store import PackedStore

from ..conftest import ROOT

SCRIPT = "scripts/pack_features.py"


@pytest.fixture
def pairs(tmp_path):
    for kind in ("features", "labels"):
        (tmp_path / "src" / f"imagenet256_{kind}").mkdir(parents=True)
    for index in range(30):
        latent = np.random.default_rng(index).standard_normal((1, 4, 8, 8)).astype(np.float32)
        np.save(tmp_path / "src" / "imagenet256_features" / f"{index}.npy", latent)
        np.save(tmp_path / "src" / "imagenet256_labels" / f"{index}.npy", np.array([index % 10]))
    return tmp_path / "src"


def test_pairs_are_packed_verified_and_packed_back(run_command, pairs, tmp_path):
    flags = ["--label-names", "imagenet", "--vae", "a/vae", "--scaling-factor", 0.18215, "--shard-size", 12, "--verify"]
    result = run_command(SCRIPT, pairs, tmp_path / "store", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"{tmp_path / 'store'} holds 30 latents [4, 8, 8]\n"
        "verified: all 30 equal their source, rounded to float16, and so do their labels\n"
    )
    assert "latents/s" in result.stderr
    assert result.stderr.count("write:") == 2  # no terminal: the bar is drawn at its ends and every ten seconds
    store = PackedStore(tmp_path / "store")
    assert (store.num_classes, store.vae) == (1000, {"name": "a/vae", "scaling_factor": 0.18215})
    assert store.label_names[1].startswith("goldfish")
    again = run_command(SCRIPT, pairs, tmp_path / "store", *flags)
    assert again.stdout == "30 of 30 latents are there already\n" + result.stdout
    back = run_command(SCRIPT, tmp_path / "store", tmp_path / "npy", "--to", "npy", "--npy-name", "small", "--verify")
    assert back.returncode == 0, back.stderr
    assert "rounded to float32" in back.stdout
    latent = np.load(tmp_path / "npy" / "small_features" / "7.npy")
    assert (latent.shape, latent.dtype) == ((1, 4, 8, 8), np.float32)
    np.testing.assert_array_equal(latent, np.load(pairs / "imagenet256_features" / "7.npy").astype(np.float16))
    assert np.load(tmp_path / "npy" / "small_labels" / "7.npy").tolist() == [7]


def test_a_disk_that_takes_no_more_is_one_line_and_the_same_command_goes_on(pairs, tmp_path):
    """A limit on the size of files stops the writing as a full disk would: within a file."""
    command = [sys.executable, SCRIPT, pairs, tmp_path / "store", "--num-classes", "10", "--shard-size", "12"]

    def run(limit):
        return subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        )

    result = run(5_000)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "cannot write" in errors[0]
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["plan.json"]
    assert run(resource.RLIM_INFINITY).returncode == 0
    assert len(PackedStore(tmp_path / "store")) == 30


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "do not say how many classes there are; give --num-classes"),
        (["--num-classes", "5"], "says class 5 of 5; raise --num-classes"),
        (["--num-classes", "10", "--shard-size", "0"], "--shard-size must be 1 or more"),
        (["--num-classes", "10", "--scaling-factor", "nan"], "--scaling-factor must be positive"),
        (["--num-classes", "10", "--label-names", "nowhere.json"], "nowhere.json"),
        (["--num-classes", "5", "--label-names", "imagenet"], "label_names has ids outside [0, 5)"),
        (["--num-classes", "10", "--dtype", "bfloat16"], "bfloat16"),
        (["--num-clases", "10"], "Did you mean 'num-classes'?"),
        (["--to", "csv"], "csv"),
    ],
)
def test_what_cannot_be_packed_is_one_line(run_here, pairs, tmp_path, flags, told):
    result = run_here(SCRIPT, pairs, tmp_path / "store", *flags)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store" / "index.json").exists()


def test_a_value_that_float16_cannot_hold_names_its_file(run_here, pairs, tmp_path):
    np.save(pairs / "imagenet256_features" / "21.npy", np.full((1, 4, 8, 8), 7e4, np.float32))
    result = run_here(SCRIPT, pairs, tmp_path / "store", "--num-classes", 10)
    assert result.returncode == 2
    assert (
        "imagenet256_features/21.npy (sample 21) holds 70000, which float16 cannot; use --dtype float32"
        in result.stderr
    )


def test_the_plan_of_a_refused_folder_is_quoted(run_here, pairs, tmp_path):
    flags = ["--num-classes", 10, "--shard-size", 12]
    np.save(pairs / "imagenet256_labels" / "28.npy", np.array([11]))  # the last shard cannot be written
    assert "says class 11 of 10" in run_here(SCRIPT, pairs, tmp_path / "store", *flags).stderr
    assert json.loads((tmp_path / "store" / "plan.json").read_text())["shard_size"] == 12
    result = run_here(SCRIPT, pairs, tmp_path / "store", "--num-classes", 12, "--shard-size", 10)
    assert "shard_size was 12, now 10" in result.stderr
    assert "num_classes was 10, now 12" in result.stderr
