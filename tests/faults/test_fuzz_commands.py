"""Arbitrary command lines and recipe files: a plan or one line that starts with ``error:``, and never a write."""

import contextlib
import functools
import importlib
import io
import json
import math
import re
import sys
from dataclasses import fields

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from paddle_dit.cli import parse
from paddle_dit.deploy.drawing import InferOptions
from paddle_dit.errors import entry_point
from paddle_dit.sampling.options import ManyOptions, SampleOptions
from paddle_dit.training.plan import make_plan
from paddle_dit.training.plan_report import describe
from paddle_dit.training.recipe import TrainRecipe

from ..conftest import ROOT

# What a hypothesis rarely hits upon by itself.
NUMBERS = st.sampled_from(
    [
        0,
        1,
        -1,
        2,
        3.5,
        2**31,
        2**63,
        -(2**64),
        10**30,
        10**200,
        -0.0,
        1e-320,
        1e300,
        -1e300,
        math.nan,
        math.inf,
        -math.inf,
    ]
)
NAMES = st.sampled_from(["", " ", "a\nb", "../x", "/etc/passwd", "a\0b", ".", "x.json", "--help", "-1", "-inf", "nan"])
WORDS = st.sampled_from(
    ["DiT-S/4", "DiT-Digits/2", "fp16", "O2", "stage1", "cosine", "steps", "H100", "true", "none", "latents", "32"]
)
TEXT = st.text(st.characters(), max_size=50)  # with halves of surrogate pairs, which JSON and YAML can state
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | NAMES | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=6,
)


def fuzzed(examples, *strategies, explicit=()):
    """Return a decorator that calls a function with ``examples`` draws, and with ``explicit`` values first."""

    def decorate(function):
        for values in explicit:
            function = example(*values)(function)
        return settings(max_examples=examples, suppress_health_check=list(HealthCheck))(given(*strategies)(function))

    return decorate


few_and_many = pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])


def snapshot(folder):
    """Return the names, sizes and times of all that is in a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def refused_or_done(command, folder):
    """Run a command as a script would; fail at a traceback, an answer of several lines, or a change in ``folder``."""
    before, said = snapshot(folder), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            entry_point(command)()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    assert code in (0, 2)
    if code == 2:
        *_, last, end = said.getvalue().split("\n")
        assert re.fullmatch(r"error: \S.*", last)
        assert end == ""
    assert snapshot(folder) == before


@pytest.fixture
def here(tmp_path, monkeypatch, latent_store):
    """Return the working folder; the latents are where ``train.py`` expects them."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    latent_store.rename(folder / "data" / "fastdit_imagenet256")
    monkeypatch.chdir(folder)
    return folder


def values_for(option):
    """Draw mostly values of the type of a dataclass's field."""
    kind, number = str(option.type), NUMBERS | st.integers() | st.floats() | st.integers(0, 100)
    if "bool" in kind:
        return st.booleans() | JSON
    fitting = number if "int" in kind or "float" in kind else NAMES | WORDS | TEXT
    return fitting | fitting | st.lists(number, min_size=2, max_size=2) | JSON


def settings_of(options):
    """Draw up to four fields of a dataclass with a value for each."""
    choices = [st.tuples(st.just(option.name), values_for(option)) for option in fields(options)]
    return st.lists(st.one_of(choices), max_size=4).map(dict)


def command_lines(options):
    """Draw arguments: real flags of a dataclass, with values of their type or any, and stray words."""
    flag = st.sampled_from([f"--{option.name}" for option in fields(options)] + ["-c", "--help", "--", "-"])
    stray = st.lists(flag | st.text(max_size=50) | NAMES | WORDS, max_size=3) | st.just([])
    return st.builds(as_arguments, settings_of(options), stray, st.booleans())


def as_arguments(values, stray, hyphens):
    arguments = []
    for name, value in values.items():
        words = [str(item) for item in (value if isinstance(value, list) else [value])]
        flag = f"--{name.replace('_', '-') if hyphens else name}"
        arguments += [flag, *words] if len(words) != 1 else [f"{flag}={words[0]}"]
    # No system passes on a NUL, or what is no text.
    return [word.replace("\0", "").encode(errors="ignore").decode() for word in [*arguments, *stray]]


@st.composite
def recipes(draw, options, shipped):
    """Draw the bytes of a recipe: any, any YAML, real names with any values, or a shipped one with a change."""
    kind = draw(st.sampled_from(["bytes", "yaml", "options", "json", "value", "byte"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    text = draw(st.sampled_from(shipped))
    if kind == "byte":
        place = draw(st.integers(0, len(text) - 1))
        return text[:place] + draw(st.binary(max_size=2)) + text[place + 1 :]
    if kind == "value":
        keys = yaml.safe_load(text)
        keys[draw(st.sampled_from(list(keys)))] = draw(JSON)
    elif kind == "yaml":
        keys = draw(JSON)
    else:
        keys = draw(settings_of(options))
    if kind == "json":
        return json.dumps(keys).encode()
    return yaml.safe_dump(keys, allow_unicode=draw(st.booleans())).encode(errors="surrogatepass")


HOSTILE_RECIPES = [
    b"model: !!int ''",
    b"max_steps: !!bool x",
    b"output_dir: 2024-13-45",
    b"max_steps: " + b"9" * 5000,
    b"max_steps: 0x" + b"f" * 5000,
    b"[" * 1500,
    b"a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]",
    b"? [a, b]\n: c",
    b"model: !!binary aGVsbG8=",
    b"guidance_scales: [1, --tyro-write-completion]",
    b"tyro-write-completion: [bash, written]",
    b"help: true",
    b'output_dir: "a\\0b"',
    b'output_dir: "\\ud800"',
    b"epochs: .nan",
    b"epochs: 1.0e+300",
    b"model: DiT-S/2\nimage_size: 16\nmax_steps: " + b"9" * 400,
]


@few_and_many
def test_any_command_line_of_train_is_planned_or_refused_in_one_line(examples, here):
    @fuzzed(examples, command_lines(TrainRecipe), explicit=[([],), (["-c"],), (["--epochs", "nan"],)])
    def plan(argv):
        for dry_run in ([], ["--dry-run"]):
            small = ["--model", "DiT-Digits/2", "--global-batch-size", "8"]
            refused_or_done(functools.partial(plan_of_train, [*small, *argv, *dry_run]), here)

    plan()


@few_and_many
def test_any_recipe_of_train_is_planned_or_refused_in_one_line(examples, here, tmp_path):
    path = tmp_path / "recipe.yaml"
    shipped = [recipe.read_bytes() for recipe in sorted((ROOT / "configs").glob("train-*.yaml"))]

    @fuzzed(examples, recipes(TrainRecipe, shipped), explicit=[(recipe,) for recipe in HOSTILE_RECIPES])
    def plan(recipe):
        path.write_bytes(recipe)
        for flags in (["--global-batch-size", "8"], ["--dry-run"]):
            refused_or_done(functools.partial(plan_of_train, ["-c", str(path), *flags]), here)

    plan()


def plan_of_train(argv):
    print(describe(make_plan(parse(TrainRecipe, argv, description=""))))


@few_and_many
def test_any_command_line_of_the_trainer_is_planned_or_refused_in_one_line(examples, here):
    from paddle_dit.training.trainer_arguments import DiTTrainingArguments

    explicit = [(["--warmup_ratio", "nan", "--max_steps", "5"],)]

    @fuzzed(examples, command_lines(DiTTrainingArguments), explicit=explicit)
    def plan(argv):
        for dry_run in ([], ["--dry_run", "true"]):
            small = ["--model_name_or_config", "DiT-Digits/2", "--per_device_train_batch_size", "8"]
            refused_or_done(functools.partial(plan_of_trainer, [*small, *argv, *dry_run]), here)

    plan()


@few_and_many
def test_any_recipe_of_the_trainer_is_planned_or_refused_in_one_line(examples, here, tmp_path):
    from paddle_dit.training.trainer_arguments import DiTTrainingArguments

    path = tmp_path / "recipe.yaml"
    shipped = [(ROOT / "configs" / "trainer-digits.yaml").read_bytes()]

    @fuzzed(examples, recipes(DiTTrainingArguments, shipped), explicit=[(recipe,) for recipe in HOSTILE_RECIPES])
    def plan(recipe):
        path.write_bytes(recipe)
        for flags in (["--per_device_train_batch_size", "8"], ["--dry_run", "true"]):
            refused_or_done(functools.partial(plan_of_trainer, [str(path), *flags]), here)

    plan()


def plan_of_trainer(argv):
    from paddle_dit.training.trainer_arguments import parse_arguments, trainer_flag_names

    arguments = parse_arguments(argv, description="")
    with trainer_flag_names():
        print(describe(make_plan(arguments.recipe())))


@few_and_many
@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("sample.py", ["--model", "absent"]),
        ("sample_ddp.py", ["--ckpt", "absent"]),
        ("convert_dit_to_ppdiffusers.py", ["--checkpoint", "absent"]),
        ("check_parity.py", ["absent.npz"]),
        ("evaluate.py", ["absent.npz"]),
        ("export_inference.py", ["--pipeline", "absent", "--output", "engine"]),
        ("infer.py", ["--model", "absent"]),
    ],
)
def test_any_command_line_of_a_script_is_refused_in_one_line(examples, script, needed, here, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module(script.removesuffix(".py"))

    elsewhere = {"sample.py": SampleOptions, "sample_ddp.py": ManyOptions, "infer.py": InferOptions}
    options = elsewhere.get(script) or module.Options

    @fuzzed(examples, command_lines(options), explicit=[([],)])
    def run(argv):
        monkeypatch.setattr(sys, "argv", [script, *needed, *argv])
        refused_or_done(module.main, here)

    run()


def test_a_name_that_is_too_long_for_the_disk_is_refused_in_one_line(here):
    for flag in ("--output-dir", "--feature-path", "-c"):
        refused_or_done(functools.partial(plan_of_train, [flag, "x" * 300]), here)
