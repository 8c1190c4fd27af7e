"""Command lines from dataclasses: flags, a YAML recipe below them, and one-line errors.

A script declares a dataclass whose field docstrings are its help, then calls :func:`parse`. Flags take hyphens or
underscores. If the dataclass has a ``config`` field, ``-c recipe.yaml`` supplies flags that the command line overrides:
the recipe is turned into flags, so that one parser checks both.
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from paddle_dit.errors import ConfigError, nearest

T = TypeVar("T")


def parse(recipe_type: type[T], argv: Sequence[str] | None = None, *, description: str) -> T:
    """Build ``recipe_type`` from the command line.

    Args:
        recipe_type: a dataclass; every field is a flag.
        argv: the arguments, ``sys.argv[1:]`` by default.
        description: the head of ``--help``, usually the script's docstring.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if any(field.name == "config" for field in fields(recipe_type)):
        booleans = {field.name for field in fields(recipe_type) if field.type in (bool, "bool")}
        argv = [*_recipe_flags(argv, booleans), *argv]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            recipe, unknown = tyro.cli(recipe_type, args=argv, description=description, return_unknown_args=True)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_first_paragraph(complaint.getvalue())) from None
        raise
    if unknown:
        known = [field.name.replace("_", "-") for field in fields(recipe_type)]
        flag = unknown[0].lstrip("-").replace("_", "-").split("=")[0]
        raise ConfigError(f"unknown option '{unknown[0]}'.{nearest(flag, known)} See --help for the whole list.")
    return recipe


def _recipe_flags(argv: Sequence[str], booleans: set[str]) -> list[str]:
    """Return the flags written in the YAML file that ``-c``/``--config`` names, or none."""
    path = None
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag in ("-c", "--config"):
            path = Path(value)
        elif flag.startswith(("-c=", "--config=")):
            path = Path(flag.split("=", 1)[1])
    if path is None:
        return []
    return [token for key, value in read_recipe(path).items() for token in _as_flag(path, str(key), value, booleans)]


def read_recipe(path: Path) -> dict:
    """Return the ``key: value`` lines of a YAML (or JSON) file; ConfigError where it holds anything else."""
    import yaml

    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; give an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(keys, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, one per flag")
    return keys


def _as_flag(path: Path, key: str, value: object, booleans: set[str]) -> list[str]:
    flag = key.replace("_", "-")
    if flag == "config":
        raise ConfigError(f"{path}: a recipe cannot name another recipe; remove 'config'")
    if value is None:
        return []
    if key.replace("-", "_") in booleans and not isinstance(value, bool):
        raise ConfigError(f"{path}: '{key}' must be true or false, got {value!r}")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    if isinstance(value, dict):
        raise ConfigError(f"{path}: '{key}' holds a nested mapping; write flat 'key: value' lines")
    return [f"--{flag}", str(value)]


def _first_paragraph(box: str) -> str:
    """Reduce the parser's boxed message to its first sentence."""
    lines = [re.sub(r"^[│\s]+|[│\s]+$", "", line) for line in box.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰─"]
    paragraph = " ".join(lines) if lines else "the command line could not be read"
    return paragraph.split(" Got errors:")[0].split(" Argument helptext:")[0].rstrip(".") + ". See --help."
