"""scripts/verify_data.py as a process: a verdict, an exit code, and one line for each fault."""

import numpy as np
import pytest

SCRIPT = "scripts/verify_data.py"


def write_pairs(folder, count=30):
    for kind in ("features", "labels"):
        (folder / f"digits_{kind}").mkdir(parents=True)
    for index in range(count):
        np.save(folder / "digits_features" / f"{index}.npy", np.full((1, 4, 8, 8), index, np.float32))
        np.save(folder / "digits_labels" / f"{index}.npy", np.array([index % 10]))
    return folder


def test_a_whole_store_is_said_to_be_well(run_command, latent_store):
    result = run_command(SCRIPT, latent_store)
    assert result.returncode == 0, result.stderr
    size = sum(path.stat().st_size for path in latent_store.glob("*.npy"))
    assert result.stdout == (
        f"all is well: packed store of 64 latents, float32 [4, 8, 8], {size:,} bytes; "
        "10 of 10 classes occur, 6 to 7 samples each\n"
    )
    assert "verify: 100%" in result.stderr
    assert "66.3k/66.3k" in result.stderr


def test_a_damaged_store_is_read_to_its_end_and_all_is_named(run_here, latent_store):
    shard = np.load(latent_store / "latents-00000.npy", mmap_mode="r+")
    shard[21, 0, 0, 0] = np.nan
    shard.flush()
    (latent_store / "labels.npy").unlink()
    result = run_here(SCRIPT, latent_store)
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert "latents-00000.npy has changed" in lines[0]
    assert "latents-00000.npy holds NaN or infinity in sample 21;" in lines[1]
    assert "labels.npy is missing" in lines[2]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    mend = "copy or make the store again, or only the files named"
    assert errors == [f"error: {latent_store} is damaged, 3 faults; {mend}"]
    assert "Traceback" not in result.stderr


def test_a_store_whose_index_is_damaged_is_one_line(run_here, latent_store):
    (latent_store / "index.json").write_text("{")
    result = run_here(SCRIPT, latent_store)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {latent_store / 'index.json'} cannot be read")


def test_whole_pairs_are_said_to_be_well(run_here, tmp_path):
    result = run_here(SCRIPT, write_pairs(tmp_path), "--num-classes", 10)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("all is well: 30 npy pairs, float32 [4, 8, 8]; 10 of 10 classes occur, 3 samples each\n")
    assert "30.0/30.0" in result.stderr
    assert result.stderr.count("verify:") == 2  # no terminal: the bar is drawn at its ends and every ten seconds


def test_faults_beyond_the_limit_are_counted(run_here, tmp_path):
    write_pairs(tmp_path)
    for index in range(3, 30):
        (tmp_path / "digits_features" / f"{index}.npy").write_bytes(b"")
    result = run_here(SCRIPT, tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 2
    assert len(lines) == 21
    assert "features/22.npy is not a readable" in lines[19]
    assert lines[20] == "and 7 more (--max-lines 27 names them all)"
    assert f"error: {tmp_path} is damaged, 27 faults; restore or extract again" in result.stderr
    assert result.stderr.count("verify:") == 2
    lines = run_here(SCRIPT, tmp_path, "--max-lines", 27).stdout.splitlines()
    assert len(lines) == 27


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "there is no folder nowhere"),
        ([], "PATH"),
        ([".", "--num-classes", "0"], "--num-classes must be 1 or more"),
        ([".", "--max-lines", "0"], "--max-lines must be 1 or more"),
        ([".", "--num-clases", "5"], "Did you mean 'num-classes'?"),
        (["data"], "data is no data set"),
    ],
)
def test_what_cannot_be_checked_is_one_line(run_here, arguments, told):
    result = run_here(SCRIPT, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error:")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
