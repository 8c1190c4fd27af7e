"""docs/reproduce.md: its commands are understood, and its costs are the planner's."""

import re
import shlex

import pytest

from paddle_dit.cli import parse
from paddle_dit.config import DiTConfig
from paddle_dit.evaluation.options import Options as EvaluationOptions
from paddle_dit.extraction.options import ExtractionOptions
from paddle_dit.sampling.options import SWITCHES, ManyOptions
from paddle_dit.training.costs import PEAK_TFLOPS, Setup, seconds_per_step

from .conftest import ROOT

PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
TFLOPS = {card: 0.4 * PEAK_TFLOPS[card] for card in ("A100", "H100")}


def commands(script):
    lines = re.findall(rf"^python .*?{re.escape(script)} (.*)$", PAGE, flags=re.MULTILINE)
    assert lines
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("scripts/sample_ddp.py", ManyOptions),
        ("scripts/evaluate.py", EvaluationOptions),
        ("scripts/extract_features.py", ExtractionOptions),
    ],
)
def test_every_command_is_understood(script, options):
    for arguments in commands(script):
        parse(options, arguments, description="", **({"switches": SWITCHES} if options is ManyOptions else {})).check()


def test_the_training_commands_can_be_planned(run_command):
    small, large = commands("train.py")
    result = run_command("train.py", *small, "--cards", "8", "--gpu", "A100", "--dry-run")
    assert result.returncode == 0, result.stderr
    hours = re.search(r"time for 400K steps.*?([\d.]+) hours", result.stdout)[1]
    assert f"| {float(hours):.1f} h |" in PAGE
    result = run_command("train.py", *large, "--cards", "8", "--dry-run")
    assert "latents                                        1,281,167 x [4, 64, 64]" in result.stdout, result.stderr


def training_days(config, steps, card):
    return steps * seconds_per_step(config, Setup(32, 8), 256, TFLOPS[card]) / 86400


def test_costs_are_the_planners():
    rows = re.findall(r"^\| (DiT-\S+) \| [\d.]+ \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 12
    for name, cells in rows:
        config = DiTConfig.from_preset(name)
        told = [float(cell.split()[0]) for cell in cells.split(" | ")]
        training = [24 * training_days(config, 400_000, card) for card in TFLOPS]
        drawing = [50_000 * 250 * 2 * config.multiply_adds() / (8e12 * tflops) / 60 for tflops in TFLOPS.values()]
        assert told == pytest.approx([*training, *drawing], rel=0.04, abs=0.05)
    days = [training_days(DiTConfig.from_preset("DiT-XL/2"), 7e6, card) for card in TFLOPS]
    days += [training_days(DiTConfig.from_preset("DiT-XL/2", sample_size=64), 3e6, card) for card in TFLOPS]
    told = re.findall(r"([\d.]+) (?:days )?on\s8 × [AH]100", " ".join(PAGE.split()))
    assert [float(value) for value in told if value != "1.7"] == pytest.approx(days, abs=0.06)
