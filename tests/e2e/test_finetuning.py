"""The comparison of ways to fine-tune, as a user runs it, with very few steps."""

import re

import pytest


@pytest.mark.slow
def test_every_way_gets_a_row_of_the_table(run_command, tmp_path):
    few = ["--pretrain-steps", 2, "--steps", 2, "--samples", 20, "--output", tmp_path]
    result = run_command("benchmarks/finetune_digits.py", *few)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if re.search(r"\| [\d.]+% \| [\d.]+% \|", line)]
    assert len(rows) == 7
    assert all("%" in row.split("|")[4] for row in rows[1:])
    assert result.stdout.count("label table: 5 of 10 rows kept by name, 5 start from the null row") == 4
    assert result.stdout.count("of 560,384 train") == 3
