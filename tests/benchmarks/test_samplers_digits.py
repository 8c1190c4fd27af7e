"""The comparison of samplers on the digits: its figures, its words, and the whole command with very few digits."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.samplers_digits import BASE, BEST, Options, Row, measure, plot, rows, table, verdict
from paddle_dit.config import DiTConfig
from paddle_dit.data.digits import as_digits
from paddle_dit.errors import ConfigError
from paddle_dit.evaluation.digit_features import digit_figures
from paddle_dit.evaluation.digits import judge
from paddle_dit.generation import draw_images, load_generator

from ..scripts.test_sample import make_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), DiTConfig.from_preset("DiT-Digits/2"))


def measured(way, scale=2.0, fid=(4.0, 5.0), seconds=0.2, interval=None):
    figures = {"fid": list(fid), "accuracy": [0.99, 0.97], "recall": [0.5, 0.5]}
    return Row(*way, scale, interval, **figures, seconds=[0.0, seconds, 9.0], cpu_seconds=[seconds / 2])


def test_a_rows_figures_are_those_of_the_digits_of_each_seed(run_folder):
    source, row = load_generator(run_folder), Row("ddim", 2, 2.0, (0, 500))
    measure([row, Row("dpm-solver++", 2)], source, Options(samples=25, seeds=2, batch_size=10))
    labels = np.arange(25) % 10
    for seed in (0, 1):
        images = draw_images(source, labels, row.options(seed))
        assert row.fid[seed] == pytest.approx(digit_figures(images)["fid"], rel=1e-3)
        assert row.accuracy[seed] == judge(as_digits(images), labels).generated_accuracy
    assert row.fid[0] != row.fid[1]
    assert len(row.seconds) == len(row.cpu_seconds) == 6


def test_ratios_are_to_the_base_seed_by_seed():
    lines = table([measured(BASE), measured(BEST, fid=(2.0, 5.0), seconds=0.01, interval=(200, 800))]).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        *(
            "dpm-solver++",
            "10",
            "linspace",
            "2",
            "200 to 800",
            "3.50 ± 2.12",
            "0.75 ± 0.35",
            "98.0 ± 1.4",
            "0.50 ± 0.00",
        ),
        *("10.0", "0.050", "5.0"),
    ]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(("fid", "says"), [((4.2, 5.25), "yes"), ((4.4, 5.4), "NO"), ((1.0, 1.0), "yes")])
def test_the_verdict_is_on_the_best_of_ten_steps_with_the_same_guidance(fid, says):
    others = [
        measured(("ddim", 10), fid=(9, 9)),
        measured(BEST, 1.5, (1, 1)),
        measured(BEST, 2.0, (1, 1), interval=(1, 2)),
    ]
    found = [measured(BASE, 1.0, (1.0, 1.0)), measured(BASE), *others, measured(BEST, fid=fid)]
    told = verdict(found, 2.0)
    assert f"in 10? {says}: dpm-solver++ has " in told
    assert "(4.50 ± 0.71)" in told


def test_no_two_rows_are_the_same_and_every_one_is_in_the_plot(tmp_path):
    ways = [row.way for row in rows()]
    assert len(set(ways)) == len(ways)
    found = [replace(measured(way[:2]), scale=way[2], interval=way[3], eta=way[4]) for way in ways]
    plot(found, {"real": 1.0, "halves": 0.5, "decoded": 0.4}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"model": Path("nowhere")}, "run bash scripts/quickstart.sh"), ({"samples": 3}, "--samples must be 4 or more")],
)
def test_what_cannot_be_compared_is_refused(changed, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        Options(**{"model": tmp_path, **changed}).check()


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_a_plot(run_command, run_folder, tmp_path):
    few = ["--model", run_folder, "--samples", 4, "--seeds", 1, "--plot", tmp_path / "new" / "plot.png"]
    result = run_command("benchmarks/samplers_digits.py", *few)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"^\| (?:ddpm|ddim|ddim, eta 1|dpm-solver\+\+) \|", result.stdout, re.MULTILINE)) == len(
        rows()
    )
    assert result.stdout.count("within 5 % of ddpm's 250 steps") == 2
    assert (tmp_path / "new" / "plot.png").is_file()
