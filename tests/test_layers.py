"""A room of the package imports only rooms below it, functions' own imports included."""

import ast

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "paddle_dit"
ROOMS = [  # from the top; a module is named by the first room that holds it, and anything else is on the floor
    ["evaluation"],
    ["deploy", "training"],
    ["sampling"],
    ["generation"],
    ["conversion", "extraction"],
    ["data", "diffusion", "models"],
]
MODULES = sorted(path.relative_to(PACKAGE.parent).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def height(module):
    """Return how many storeys are below a module's: 0 for the floor."""
    room = [*module.split("."), ""][1]
    return next((len(ROOMS) - index for index, rooms in enumerate(ROOMS) if room in rooms), 0)


def imported(text):
    """Return the package's modules that a module's text imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "paddle_dit"}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__")])
def test_imports_go_downwards(module):
    names = imported((PACKAGE.parent / f"{module}.py").read_text(encoding="utf-8"))
    own = height(module.replace("/", "."))
    assert [name for name in sorted(names) if height(name) > own] == []


def test_every_room_is_there_and_an_upward_import_is_seen():
    assert all((PACKAGE / room).exists() or (PACKAGE / f"{room}.py").exists() for rooms in ROOMS for room in rooms)
    (lazy,) = imported("def load():\n    from paddle_dit.conversion.loading import load_model\n    import numpy")
    assert height(lazy) > height("paddle_dit.models.vae") > height("paddle_dit.readers") == 0
    assert height(*imported("from paddle_dit import evaluation")) == len(ROOMS)
