"""Command lines from dataclasses: flags, a YAML recipe below them, and one-line errors.

A script declares a dataclass whose field docstrings are its help, then calls :func:`parse`. Flags take hyphens or
underscores. If the dataclass has a ``config`` field, ``-c recipe.yaml`` supplies flags that the command line overrides:
the recipe is turned into flags, so that one parser checks both.
"""

import contextlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, get_type_hints

from paddle_dit.errors import ConfigError, nearest

T = TypeVar("T")
Switches = Mapping[str, tuple[str, str, str]]  # key -> (field, its text if the key is true, its text if it is false)
_NO_SWITCHES: Switches = MappingProxyType({})


def parse(
    recipe_type: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    switches: Switches = MappingProxyType({}),
) -> T:
    """Build ``recipe_type`` from the command line.

    Args:
        recipe_type: a dataclass; every field is a flag.
        argv: the arguments, ``sys.argv[1:]`` by default.
        description: the head of ``--help``, usually the script's docstring.
        switches: keys that a recipe may have besides, as others' recipes do: what each stands for if true or false.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if any(field.name == "config" for field in fields(recipe_type)):
        argv = [*_recipe_flags(argv, recipe_type, switches), *argv]
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


def _recipe_flags(argv: Sequence[str], recipe_type: type, switches: Switches) -> list[str]:
    """Return the flags written in the YAML file that ``-c``/``--config`` names, or none."""
    path = None
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag in ("-c", "--config"):
            path = Path(value)
        elif flag.startswith(("-c=", "--config=")):
            path = Path(flag.split("=", 1)[1])
    if path is None:
        return []
    values = read_recipe(path, {*_names(recipe_type), *switches})
    for key in switches.keys() & values.keys():
        name, on, off = switches[key]
        if name in values:
            raise ConfigError(f"{path}: '{key}' and '{name}' say the same thing; remove one")
        if not isinstance(values[key], bool):
            raise ConfigError(f"{path}: '{key}' must be true or false, got {values[key]!r}")
        values[name] = on if values.pop(key) else off
    return flags(path, values, recipe_type)


def flags(source: Path, values: Mapping[str, object], recipe_type: type) -> list[str]:
    """Return the flags that say the same as values read from a file.

    Args:
        source: the file, for messages.
        values: by name with underscores: numbers, texts, true, false, None, or lists of numbers or texts.
        recipe_type: the dataclass that they are fields of.

    Raises:
        ConfigError: a value that one flag could not say.
    """
    booleans = {field.name for field in fields(recipe_type) if field.type in (bool, "bool")}
    tokens = []
    for key, value in values.items():
        tokens += _as_flag(source, key, _plain(source, key, value), key in booleans)
    return tokens


def _names(recipe_type: type) -> set[str]:
    """Return the names that a recipe may have as keys, with underscores: the fields' and their long aliases."""
    names = set()
    for name, hint in get_type_hints(recipe_type, include_extras=True).items():
        aliases = [alias for extra in getattr(hint, "__metadata__", ()) for alias in extra.aliases or ()]
        names |= {name, *(alias[2:].replace("-", "_") for alias in aliases if alias.startswith("--"))}
    return names


def read_recipe(path: Path, names: set[str]) -> dict[str, str | bool | list[str] | None]:
    """Read the ``key: value`` lines of a YAML or JSON file.

    Args:
        path: the file.
        names: the keys that it may have, with underscores; it may write them with hyphens.

    Returns:
        Name with underscores -> text, list of texts, true, false or None.

    Raises:
        ConfigError: the file cannot be read, or holds anything that one flag could not say. No key or value can be
            taken for another flag.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; give an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    keys = _load_yaml(path, text)
    if not isinstance(keys, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, one per flag")
    known = {}
    for key, value in keys.items():
        name = key.replace("-", "_") if isinstance(key, str) else None
        if name == "config":
            raise ConfigError(f"{path}: a recipe cannot name another recipe; remove 'config'")
        if name not in names:
            spelled = names if "_" in str(key) else [known.replace("_", "-") for known in names]
            hint = nearest(key, spelled) if name else ""
            raise ConfigError(f"{path}: unknown option {key!r}.{hint} See --help for the whole list.")
        if name in known:
            raise ConfigError(f"{path}: '{key}' is there twice; remove one")
        known[name] = _plain(path, key, value)
    return known


def _load_yaml(path: Path, text: str) -> object:
    import yaml

    try:
        # A few aliases of aliases can stand for gigabytes, and flat lines have no use for them.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise yaml.YAMLError("aliases (*name) are not admitted")
        keys = yaml.safe_load(text)
    except Exception as error:  # a tag such as !!int before text that is none fails in many ways
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{path} is not valid YAML: {reason.splitlines()[0]}") from None
    return {} if keys is None else keys


def _plain(path: Path, key: str, value: object) -> str | bool | list[str] | None:
    """Return a value of a recipe as text, or a list of texts; true, false and None stay."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        items = [_plain(path, key, item) for item in value if not isinstance(item, list)]
        if len(items) < len(value) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{path}: '{key}' holds a nested list or no value; write numbers or words")
        if any(re.match("-[^0-9.]", item) for item in items):
            raise ConfigError(f"{path}: '{key}' holds a word that begins with '-'; a list cannot name a flag")
        return items
    if not isinstance(value, str | int | float | date):
        raise ConfigError(f"{path}: '{key}' holds a nested mapping; write flat 'key: value' lines")
    try:
        text = str(value)
        text.encode()
    except ValueError:  # an integer of thousands of digits, or half a surrogate pair
        raise ConfigError(f"{path}: '{key}' holds a number or character that cannot be written out") from None
    if "\0" in text:
        raise ConfigError(f"{path}: '{key}' holds a NUL character; remove it")
    return text


def _as_flag(path: Path, name: str, value: str | bool | list[str] | None, boolean: bool) -> list[str]:
    flag = name.replace("_", "-")
    if value is None:
        return []
    if boolean != isinstance(value, bool):
        expected = "true or false" if boolean else "no truth value"
        raise ConfigError(f"{path}: '{name}' must be {expected}, got {value!r}")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *value] if isinstance(value, list) else [f"--{flag}={value}"]


def _first_paragraph(box: str) -> str:
    """Reduce the parser's message, boxed or, where the terminal takes ASCII alone, ruled, to its first sentence."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if re.match("[╭╰─]|---", line)]
    paragraph = " ".join(filter(None, lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines))
    paragraph = paragraph.split(" Got errors:")[0].split(" Argument helptext:")[0].rstrip(".")
    return f"{paragraph or 'the command line could not be read'}. See --help."
