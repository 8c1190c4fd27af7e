"""Both training scripts on the digits, on two processes, until the judge is content."""

import sys

import pytest

ROOT_RECIPES = {
    "train.py": ["train.py", "-c", "configs/train-digits.yaml", "--feature-path", "--eval-path", "--output-dir"],
    "Trainer": [
        "train_image_generation_dit_trainer.py", "configs/trainer-digits.yaml", "--do_train",
        "--feature_path", "--eval_path", "--output_dir",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from paddle_dit.data.digits import DIGITS_VAE_FOLDER
    from paddle_dit.evaluation.quickstart import write_digits
    from paddle_dit.models.vae import load_vae

    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "heldout"):
        write_digits(folder / split, split, load_vae(str(DIGITS_VAE_FOLDER)))
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("script", ROOT_RECIPES)
def test_two_processes_learn_the_digits(script, digits, run_command, tmp_path):
    from paddle_dit.evaluation.quickstart import draw_and_judge

    *command, data, held_out, output = ROOT_RECIPES[script]
    command += [data, digits / "train", held_out, digits / "heldout", output, tmp_path / "run"]
    result = run_command(*command, processes=2, log_dir=tmp_path / "launch_log")
    assert result.returncode == 0, result.stdout[-3000:]
    verdict = draw_and_judge(tmp_path / "run", 500)
    print(script, verdict, file=sys.stderr)
    assert verdict.generated_accuracy >= 0.97
    assert (tmp_path / "run" / "samples" / "step-0006000.png").is_file()
