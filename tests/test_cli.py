import os
import subprocess
import sys
import time

import pytest

from paddle_dit.cli import parse
from paddle_dit.errors import ConfigError, entry_point
from paddle_dit.training.recipe import TrainRecipe

from .conftest import ROOT

ENTRY_POINTS = ["train.py", *sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]


def parse_recipe(*argv):
    return parse(TrainRecipe, argv, description="")


def test_flags_take_hyphens_and_underscores():
    recipe = parse_recipe("--global-batch-size", "32", "--max_steps", "7", "--no-resume", "--results-dir", "x")
    assert (recipe.global_batch_size, recipe.max_steps, recipe.resume, str(recipe.output_dir)) == (32, 7, False, "x")


def test_no_argument_gives_the_defaults():
    assert parse_recipe() == TrainRecipe()


def test_the_command_line_overrides_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: DiT-S/4\nlearning_rate: 3.0e-4\nadam-betas: [0.8, 0.9]\nresume: false\nmax_steps: null\n")
    recipe = parse_recipe("--model", "DiT-B/4", "-c", str(path))
    assert (recipe.model, recipe.learning_rate, recipe.adam_betas) == ("DiT-B/4", 3e-4, (0.8, 0.9))
    assert recipe.resume is False
    assert recipe.max_steps is None


def test_a_recipe_takes_the_other_names_of_flags_and_any_plain_value(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("results-dir: 2026-01-01\nvae: --x\nguidance_scales: [1, 2.5]\nmax_grad_norm: -1\nmodel: ''\n")
    recipe = parse_recipe("-c", str(path))
    assert (str(recipe.output_dir), recipe.vae_name_or_path, recipe.model) == ("2026-01-01", "--x", "")
    assert (recipe.guidance_scales, recipe.max_grad_norm) == ((1.0, 2.5), -1.0)


def test_an_empty_recipe_changes_nothing(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# nothing yet\n")
    assert parse_recipe("-c", str(path)) == TrainRecipe(config=path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-stpes", "3"], "Did you mean 'max-steps'"),
        (["--max-steps", "three"], "--max-steps"),
        (["--lr-schedule", "cosin"], "--lr-schedule"),
        (["-c", "absent.yaml"], "cannot read the recipe absent.yaml"),
        (["-c=absent.yaml"], "cannot read the recipe absent.yaml"),
    ],
)
def test_wrong_flags_are_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_recipe(*argv)
    assert "\n" not in str(caught.value)
    assert "---" not in str(caught.value)  # the rules that a terminal without UTF-8 gets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stpes: 3", "Did you mean 'max_steps'"),
        ("model: [", "not valid YAML"),
        ("- a", "key: value"),
        ("model: {name: a}", "nested"),
        ("learning_rate: fast", "--learning-rate"),
        ("resume: 'no'", "'resume' must be true or false"),
        ("config: other.yaml", "cannot name another recipe"),
        ("tyro-write-completion: [bash, written]", "unknown option 'tyro-write-completion'"),
        ("help: true", "unknown option 'help'"),
        ("3: 4", "unknown option 3"),
        ("max-steps: 3\nmax_steps: 4", "'max_steps' is there twice"),
        ("max_steps: true", "'max_steps' must be no truth value"),
        ("guidance_scales: [1, --dry-run]", "a list cannot name a flag"),
        ("guidance_scales: [1, [2]]", "nested list"),
        ("guidance_scales: [1, null]", "nested list or no value"),
        ("model: !!int ''", "not valid YAML: string index out of range"),
        ("model: &a x\noutput_dir: *a", "aliases .* are not admitted"),
        ('model: "a\\0b"', "'model' holds a NUL"),
        ('model: "\\ud800"', "cannot be written out"),
        ("max_steps: 0x" + "f" * 5000, "cannot be written out"),
    ],
)
def test_wrong_recipes_are_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_recipe("-c", str(path))


def test_the_shipped_recipes_can_be_read():
    for path in sorted((ROOT / "configs").glob("train-*.yaml")):
        assert parse_recipe("-c", str(path)).model


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_help_is_quick_and_needs_no_paddle(script):
    blocker = (
        "import runpy, sys; sys.modules['paddle'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", blocker, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    print(f"{script}: {time.perf_counter() - started:.2f} s")


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, paddle_dit; heavy = {'paddle', 'numpy', 'ppdiffusers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_ctrl_c_is_one_line_too(capsys):
    @entry_point
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "scripts/extract_features.py", "--help"]
        result = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")
