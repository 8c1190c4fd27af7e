"""What stands in an export's way."""

import pytest

from paddle_dit.deploy.backends import Settings
from paddle_dit.deploy.export import export
from paddle_dit.errors import ConfigError


def test_a_folder_that_appears_during_the_export_is_kept(source, tmp_path):
    output = tmp_path / "engine"

    def report(line):
        output.mkdir(exist_ok=True)
        (output / "precious").write_text("mine")

    with pytest.raises(ConfigError, match="meanwhile"):
        export(source, "", output, "paddle", Settings(max_batch_size=1), report)
    assert [path.name for path in tmp_path.rglob("*")] == ["engine", "precious"]


def test_an_output_that_is_there_is_refused_before_the_model_is_read(run_command, tmp_path):
    flags = ["--pipeline", tmp_path / "absent", "--output", tmp_path]
    result = run_command("scripts/export_inference.py", *flags)
    assert result.returncode == 2
    assert f"{tmp_path} exists" in result.stderr
