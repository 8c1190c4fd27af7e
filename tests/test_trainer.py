"""The script around PaddleNLP's Trainer: its flags, and that it trains as train.py does."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train
import train_image_generation_dit_trainer as script
from paddle_dit.config import PRESETS, DiTConfig
from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import ConfigError
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.learning_rate import learning_rate_at
from paddle_dit.training.plan import make_plan
from paddle_dit.training.session import Session
from tests.conftest import ROOT

DOCUMENTED = (
    "--do_train --output_dir X --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --learning_rate 1e-4 "
    '--weight_decay 0.0 --max_steps 1000000000 --lr_scheduler_type "constant" --warmup_steps 0 '
    "--image_logging_steps 1000 --logging_steps 50 --save_steps 5000 --save_total_limit 50 --seed 23 "
    "--dataloader_num_workers 4 --vae_name_or_path stabilityai/sd-vae-ft-mse --num_inference_steps 25 "
    "--max_grad_norm -1"
)
STEPS, BAD = 20, 21  # BAD: the sample that makes a loss infinite
EVALUATED = ("held_out_samples", 17, "eval_steps", 5)


def flags(names_and_values, hyphens=False):
    """Return ``--name value`` for each pair."""
    names = [name.replace("_", "-") if hyphens else name for name in names_and_values[::2]]
    return [text for name, value in zip(names, names_and_values[1::2], strict=True) for text in (f"--{name}", value)]


def ours(store, folder, *more):
    """Return the flags of train.py."""
    own = ["model", "DiT-Digits/2", "global_batch_size", 16, "log_every", 1, "feature_path", store]
    return [*flags([*own, "output_dir", folder], hyphens=True), *more]


TWO_PROCESSES = pytest.param("two processes", marks=[pytest.mark.slow, pytest.mark.distributed])


def trainers(store, folder, *more, batch=16):
    """Return the Trainer's flags for the same run."""
    own = ["model_name_or_config", "DiT-Digits/2", "per_device_train_batch_size", batch, "logging_steps", 1]
    return ["--do_train", *flags([*own, "feature_path", store, "output_dir", folder]), *more]


def write_store(folder, bad=None):
    latents = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    if bad is not None:
        latents[BAD] = bad
    vae = {"name": "none", "scaling_factor": 1.0, "image_size": 64}
    with StoreWriter(folder, sample_shape=(4, 8, 8), dtype="float32", num_classes=10, vae=vae) as store:
        store.append(latents, np.arange(64) % 10)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a folder with a store, for runs that several tests look at."""
    folder = tmp_path_factory.mktemp("shared")
    write_store(folder / "latents")
    return folder


@pytest.fixture
def overflowing_store(tmp_path):
    """Write a store whose one sample makes the loss infinite, though it is finite itself."""
    return write_store(tmp_path / "overflowing", 1e30 * np.random.default_rng(1).standard_normal((4, 8, 8)))


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs a script's ``main`` in this process and gives its exit code and outputs."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def shell(name, *arguments, cwd):
    """Start a shell script with this interpreter."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    environment["PADDLE_DIT_VENV"] = sys.prefix
    cwd.mkdir(exist_ok=True)
    return subprocess.Popen(
        ["bash", ROOT / "scripts" / name, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process, seconds=120):
    """Wait for a process and return its exit code and output."""
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture
def trained(run_command, shared):
    """Return a function that gives the folder of a run of real processes, made when first asked for."""

    def trained(name):
        folder, store = shared / name, shared / "latents"
        if folder.exists():
            return folder
        if name == "train.py":
            more = [*flags(["max_steps", STEPS, *EVALUATED], hyphens=True), "--ckpt-every", 3]
            result = run_command("train.py", *ours(store, folder, *more))
            code, output = result.returncode, result.stdout + result.stderr
        elif name == "trainer":
            result = run_command("train_image_generation_dit_trainer.py", *trainers(store, folder, *whole_run()))
            code, output = result.returncode, result.stdout + result.stderr
        else:
            command = trainers(store, folder, *whole_run(), batch=8)[1:]  # the shell script adds --do_train
            code, output = finished(shell("train_single_node.sh", "-n", 2, *command, cwd=shared / "cwd"))
        assert code == 0, output
        return folder

    return trained


def whole_run():
    return flags(["max_steps", STEPS, *EVALUATED, "save_steps", 3])


def log(folder, name="loss"):
    """Return step -> figure, of the lines that have it."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def tensors(folder, step):
    return {
        f"{kind}:{name}": value
        for kind in ("model", "ema", "optimizer")
        for name, value in load_file(folder / f"checkpoint-{step}" / f"{kind}.safetensors").items()
    }


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same(run, other, step, atol=0.0):
    assert sorted(log(other)) == sorted(log(run)) == list(range(1, step + 1))
    for name in ("loss", "mse", "vb"):
        assert log(other, name) == pytest.approx(log(run, name), abs=atol, rel=0), name
    expected, found = tensors(run, step), tensors(other, step)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", ["trainer", TWO_PROCESSES])
def test_the_trainer_makes_the_same_steps_as_train_py(trained, name):
    run, other = trained("train.py"), trained(name)
    assert_same(run, other, STEPS, atol=1e-5)
    for figure in ("eval_loss", "eval_mse", "eval_vb", "eval_loss_ema"):
        assert sorted(log(run, figure)) == [5, 10, 15, 20]
        assert log(other, figure) == pytest.approx(log(run, figure), abs=1e-5), figure
    assert checkpoints(other) == checkpoints(run)
    assert list((other / "visualdl").iterdir())


@pytest.mark.parametrize("name", ["train.py", "trainer", TWO_PROCESSES])
def test_the_log_tells_how_fast_a_run_is(trained, name):
    folder, cards = trained(name), 2 if name == "two processes" else 1
    per_card = {step: rate / cards for step, rate in log(folder, "images_per_second").items()}
    flops = 6 * DiTConfig(**{**PRESETS["DiT-Digits/2"], "num_classes": 10}).multiply_adds()
    assert sorted(per_card) == list(range(1, STEPS + 1))
    assert all(rate > 0 for rate in per_card.values())
    assert log(folder, "images_per_second_per_card") == pytest.approx(per_card)
    assert log(folder, "tflops_per_card") == pytest.approx(
        {step: rate * flops / 1e12 for step, rate in per_card.items()}
    )
    assert all(0 <= share <= 1 for share in log(folder, "data_wait").values())
    assert all(1 < mib < 10_000 for mib in log(folder, "peak_memory_mib").values())


def test_micro_batches_make_the_same_steps_in_both_scripts(trained, call, shared, tmp_path, monkeypatch):
    sent, reduce = [], DataParallel.reduce_gradients
    monkeypatch.setattr(DataParallel, "reduce_gradients", lambda *inputs: sent.append(1) or reduce(*inputs))
    steps = flags(["max_steps", STEPS, *EVALUATED])
    two = ["--gradient_accumulation_steps", 2, *steps]
    assert call(script.main, *trainers(shared / "latents", tmp_path / "trainer", *two, batch=8))[0] == 0
    two = ["--accumulation", 2, *flags(["max_steps", STEPS, *EVALUATED], hyphens=True)]
    assert call(train.main, *ours(shared / "latents", tmp_path / "ours", *two))[0] == 0
    assert len(sent) == 2 * STEPS
    assert_same(tmp_path / "ours", tmp_path / "trainer", STEPS, atol=1e-5)
    assert_same(trained("train.py"), tmp_path / "trainer", STEPS, atol=1e-5)


@pytest.fixture
def scheduled(call, shared, tmp_path):
    """Return a function that runs both scripts on a schedule and gives their folders."""

    def scheduled(schedule):
        course, store = ["max_steps", 8, "warmup_steps", 3], shared / "latents"
        theirs = trainers(store, tmp_path / "trainer", *flags([*course, "lr_scheduler_type", schedule]))
        own = ours(store, tmp_path / "ours", *flags([*course, "lr_schedule", schedule], hyphens=True))
        assert call(script.main, *theirs)[0] == call(train.main, *own)[0] == 0
        return tmp_path / "ours", tmp_path / "trainer"

    return scheduled


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_both_scripts_follow_the_schedule(scheduled, schedule):
    own, other = scheduled(schedule)
    assert_same(own, other, 8, atol=1e-9)


def test_both_logs_tell_the_rate_that_each_step_was_made_with(scheduled):
    own, other = scheduled("linear")
    recipe = parse("--lr_scheduler_type", "linear", "--warmup_steps", 3, "--max_steps", 8).recipe()
    expected = {step + 1: learning_rate_at(recipe, step, 8) for step in range(8)}
    assert log(own, "learning_rate") == pytest.approx(expected, abs=1e-12)
    assert log(other, "learning_rate") == pytest.approx(expected, abs=1e-12)


def parse(*arguments):
    from paddle_dit.training.trainer_arguments import parse_arguments

    return parse_arguments([str(argument) for argument in arguments], description="")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_paddlenlps_schedules_are_ours(schedule, warmup):
    from paddlenlp.trainer.trainer_utils import get_scheduler

    total = 50
    arguments = parse("--lr_scheduler_type", schedule, "--warmup_steps", warmup, "--learning_rate", 3e-4)
    theirs = get_scheduler(
        arguments.lr_scheduler_type, arguments.learning_rate, arguments.get_warmup_steps(total), total
    )
    recipe = arguments.recipe()
    assert (recipe.lr_schedule, recipe.warmup_steps) == (schedule, warmup)
    for step in range(total):
        assert theirs.get_lr() == pytest.approx(learning_rate_at(recipe, step, total), abs=1e-12), step
        theirs.step()


def test_a_share_of_the_steps_can_be_warmed_up_over():
    arguments = parse("--warmup_ratio", 0.1, "--max_steps", 50)
    assert arguments.recipe().warmup_steps == 5


def test_the_documented_command_means_what_it_says():
    arguments = parse(*shlex.split(DOCUMENTED))
    recipe = arguments.recipe()
    assert arguments.do_train
    asked = {
        "output_dir": Path("X"),
        "global_batch_size": 16,
        "accumulation": 1,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "max_steps": 1_000_000_000,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "image_logging_steps": 1000,
        "log_every": 50,
        "ckpt_every": 5000,
        "save_total_limit": 50,
        "global_seed": 23,
        "num_workers": 4,
        "vae_name_or_path": "stabilityai/sd-vae-ft-mse",
        "num_inference_steps": 25,
        "max_grad_norm": -1.0,
    }
    paper = {"model": "DiT-XL/2", "adam_betas": (0.9, 0.999), "ema_decay": 0.9999, "class_dropout_prob": 0.1}
    others = {"precision": "fp32", "sharding": "none", "eval_steps": -1, "resume": True, "max_skipped_steps": 0}
    assert {name: getattr(recipe, name) for name in (asked | paper | others)} == asked | paper | others
    recipe.check()


def test_minus_one_does_not_clip():
    import paddle

    from paddle_dit.training.optimizer import build_optimizer

    model = paddle.nn.Linear(2, 2)
    free = build_optimizer(parse("--max_grad_norm", -1).recipe(), model)
    clipping = build_optimizer(parse("--max_grad_norm", 0.5).recipe(), model)
    assert free._grad_clip is None
    assert clipping._grad_clip.clip_norm == 0.5


def test_every_flag_has_its_meaning_in_train_py():
    recipe = parse(
        *("--fp16", "--fp16_opt_level", "O2", "--recompute", "--recompute_every", 2, "--sharding", "stage1"),
        *("--adam_beta1", 0.8, "--adam_beta2", 0.9, "--no_learn_sigma", "--guidance_scales", 1, 2.5),
        *("--eval_steps", 7, "--eval_path", "other", "--held_out_samples", 9),
        *("--num_train_epochs", 3, "--max_grad_norm", 2),
        *("--gradient_accumulation_steps", 4, "--per_device_train_batch_size", 3, "--ema_decay", 0.5, "--ema_warmup"),
        *("--num_classes", 5, "--image_size", 64, "--class_dropout_prob", 0.2, "--max_skipped_steps", 6),
        *("--overwrite_output_dir", "--save_steps", 11, "--feature_path", "latents", "more"),
        *("--class_subset", 3, "white shark"),
    ).recipe()
    expected = {
        "precision": "fp16",
        "amp_level": "O2",
        "recompute": 2,
        "sharding": "stage1",
        "adam_betas": (0.8, 0.9),
        "learn_sigma": False,
        "guidance_scales": (1.0, 2.5),
        "eval_steps": 7,
        "eval_path": Path("other"),
        "held_out_samples": 9,
        "epochs": 3,
        "max_steps": None,
        "max_grad_norm": 2,
        "accumulation": 4,
        "global_batch_size": 12,
        "ema_decay": 0.5,
        "ema_warmup": True,
        "num_classes": 5,
        "image_size": 64,
        "class_dropout_prob": 0.2,
        "max_skipped_steps": 6,
        "resume": False,
        "ckpt_every": 11,
        "feature_path": (Path("latents"), Path("more")),
        "class_subset": ("3", "white shark"),
    }
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert parse("--resume_from_checkpoint", "run/checkpoint-5").recipe().resume_from_checkpoint == Path(
        "run/checkpoint-5"
    )
    for newest in ("last", "true"):
        assert parse("--resume_from_checkpoint", newest).recipe().resume_from_checkpoint is None


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
def test_a_recipe_may_stand_first_and_flags_override_it(tmp_path, name):
    values = {"learning_rate": 2e-4, "seed": 5, "do-train": True, "guidance_scales": [1.0, 2.0], "learn_sigma": False}
    (tmp_path / name).write_text(json.dumps(values))  # JSON is YAML too
    arguments = parse(tmp_path / name, "--seed", 6)
    recipe = arguments.recipe()
    assert arguments.do_train
    assert (recipe.learning_rate, recipe.global_seed) == (2e-4, 6)
    assert (recipe.guidance_scales, recipe.learn_sigma) == ((1.0, 2.0), False)
    (tmp_path / name).write_text('{"lerning_rate": 1}')
    with pytest.raises(ConfigError, match=r"lerning_rate.*Did you mean 'learning_rate'"):
        parse(tmp_path / name)


def test_hyphens_are_underscores_but_not_in_values():
    arguments = parse("--do-train", "--output-dir", "a-b", "--feature-path=c-d", "--max-grad-norm", "-1")
    assert arguments.do_train
    assert (arguments.output_dir, arguments.feature_path, arguments.max_grad_norm) == ("a-b", ["c-d"], -1.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--loging_steps 4", "unknown option '--loging_steps'. Did you mean 'logging_steps'?"),
        ("--loging-steps=4", "Did you mean 'logging_steps'?"),
        ("--max_steps many", "--max_steps: invalid int value: 'many'"),
        ("--fp16 --bf16", "--fp16 and --bf16 contradict each other"),
        ("--bf16", "bf16 needs a GPU"),
        ("--fp16 --fp16_opt_level O2", "fp16 needs a GPU"),
        ("--sharding stage2", "--sharding stage2 needs GPUs"),
        ("--sharding stage9", "--sharding must be stage1, stage2 or stage3, got 'stage9'"),
        ("--tensor_parallel_degree 2", "use train.py --tensor-parallel-degree"),
        ("--report_to wandb", "--report_to wandb: not installed"),
        ("--pipeline_parallel_degree 2", "--pipeline_parallel_degree is not offered"),
        ("--amp_master_grad", "--amp_master_grad is not offered"),
        ("--optim adafactor", "--optim is not offered"),
        ("--use_async_save", "--use_async_save is not offered"),
        ("--lr_scheduler_type sawtooth", "sawtooth is not a valid SchedulerType"),
        ("--per_device_train_batch_size 65", "fewer than one global batch of 65"),
        ("--eval_steps 2 --held_out_samples 64", "too few to hold out 64"),
        ("--model_name_or_config DiT-XS/2", "unknown model 'DiT-XS/2'"),
    ],
)
def test_a_wrong_command_is_one_line_and_nothing_is_written(call, shared, tmp_path, given, told):
    code, _, err = call(script.main, *trainers(shared / "latents", tmp_path / "run", *given.split()))
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert told in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--precision bf16", "--precision bf16 needs a GPU"),
        ("--sharding stage2", "--sharding stage2 needs GPUs"),
        ("--tensor-parallel-degree 3", "launch a multiple of 3"),
        ("--global-batch-size 15 --accumulation 2", "--global-batch-size 15 is not divisible by 1 ranks x 2"),
    ],
)
def test_train_py_refuses_what_it_cannot_do_before_it_writes(call, shared, tmp_path, given, told):
    code, _, err = call(train.main, *ours(shared / "latents", tmp_path / "run", *given.split()))
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2
    assert len(errors) == 1
    assert told in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [train.main, script.main])
def test_a_checkpoint_that_is_not_there_is_one_line(call, shared, tmp_path, main):
    of = trainers if main is script.main else ours
    missing = ["--resume-from-checkpoint", tmp_path / "checkpoint-5"]
    code, _, err = call(main, *of(shared / "latents", tmp_path / "run", *missing))
    assert code == 2
    assert f"error: {tmp_path / 'checkpoint-5'} is no checkpoint" in err
    assert not list((tmp_path / "run").glob("*"))


def test_without_do_train_there_is_nothing_to_do(call, shared, tmp_path):
    code, _, err = call(script.main, *trainers(shared / "latents", tmp_path / "run")[1:])
    assert code == 2
    assert "error: nothing to do: give --do_train, or --dry_run for the plan alone" in err
    assert not (tmp_path / "run").exists()


def rows(output):
    """Return name -> value of a plan."""
    return dict(line.split("  ", 1) for line in output.splitlines() if "  " in line)


def test_a_dry_run_prints_the_plan_and_writes_nothing(call, shared, tmp_path):
    code, out, _ = call(script.main, *trainers(shared / "latents", tmp_path / "run", "--dry_run", "--max_steps", 5))
    plan = {name: value.strip() for name, value in rows(out).items()}
    assert code == 0
    assert (plan["total steps"], plan["steps per epoch"], plan["num_classes"]) == ("5", "4", "10")
    assert plan["output_dir"] == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_without_data_assumes_imagenet(call, tmp_path):
    missing = ["--feature-path", tmp_path / "missing", "--output-dir", tmp_path / "run", "--dry-run", "--cards", 8]
    plans = []
    for main, batch in ((train.main, "--global-batch-size=256"), (script.main, "--per-device-train-batch-size=32")):
        code, out, _ = call(main, *missing, batch, "--gpu", "A100")
        assert code == 0
        plans.append({name: value.strip() for name, value in rows(out).items()})
    ours, theirs = plans
    assert ours["latents"] == "1,281,167 x [4, 32, 32], assumed: there is no data yet"
    assert ours["num_classes"] == "1000"
    assert ours["steps per epoch"] == "5,004"
    assert ours["cards"] == "8, 32 samples at once on each"
    assert ours["assumed speed"] == "125 TFLOP/s per card: 40% of a A100's dense bf16 peak"
    same = ("latents", "parameters", "total steps", "memory per card", "images/s", "time for this run", "cards")
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
    for main in (train.main, script.main):
        code, _, err = call(main, *missing, "--gpu", "H1000")
        assert code == 2
        assert "unknown --gpu 'H1000'. Did you mean 'H100'?" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_run_goes_on_by_the_same_command(trained, run_command, shared, tmp_path):
    whole, store = trained("trainer"), shared / "latents"
    command = ["train_image_generation_dit_trainer.py", *trainers(store, tmp_path / "run", *whole_run())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
        end = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoint-6").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
    result = run_command(*command)
    assert result.returncode == 0, result.stderr
    assert "continuing after step" in result.stdout
    assert_same(whole, tmp_path / "run", STEPS)
    for figure in ("learning_rate", "eval_loss", "eval_loss_ema"):
        assert log(tmp_path / "run", figure) == log(whole, figure)


def test_an_interrupted_run_goes_on_in_the_middle_of_an_epoch(call, shared, tmp_path, monkeypatch):
    store, update = shared / "latents", Session.update
    course = ["max_steps", 12, "save_steps", 3, "save_total_limit", 2, "lr_scheduler_type", "linear", "warmup_steps", 2]
    assert call(script.main, *trainers(store, tmp_path / "whole", *flags(course)))[0] == 0

    def interrupted(session, losses):
        if session.updates == 7:
            raise ZeroDivisionError
        update(session, losses)

    monkeypatch.setattr(Session, "update", interrupted)
    parts = trainers(store, tmp_path / "parts", *flags(course))
    with pytest.raises(ZeroDivisionError):
        call(script.main, *parts)
    monkeypatch.setattr(Session, "update", update)
    assert checkpoints(tmp_path / "parts") == ["checkpoint-3", "checkpoint-6"]
    code, out, _ = call(script.main, *parts)
    assert code == 0
    assert "continuing after step 6" in out  # of four to an epoch
    assert_same(tmp_path / "whole", tmp_path / "parts", 12)
    assert log(tmp_path / "parts", "learning_rate") == log(tmp_path / "whole", "learning_rate")
    assert checkpoints(tmp_path / "parts") == ["checkpoint-12", "checkpoint-9"]
    code, out, _ = call(script.main, *parts)
    assert code == 0
    assert "already at step 12 of 12: nothing to do" in out


def test_each_script_continues_what_the_other_began(call, shared, tmp_path):
    store = shared / "latents"
    assert call(script.main, *trainers(store, tmp_path / "whole", "--max_steps", 6))[0] == 0
    assert call(script.main, *trainers(store, tmp_path / "parts", "--max_steps", 2))[0] == 0
    assert call(train.main, *ours(store, tmp_path / "parts", "--max-steps", 4))[0] == 0
    assert call(script.main, *trainers(store, tmp_path / "parts", "--max_steps", 6))[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "parts", 6)


def test_an_old_run_can_be_put_aside_or_gone_back_in(call, shared, tmp_path):
    folder, steps = tmp_path / "run", ["--max_steps", 6, "--save_steps", 2]
    command = trainers(shared / "latents", folder, *steps)
    assert call(script.main, *command)[0] == 0
    first, losses = tensors(folder, 6), log(folder)
    code, out, _ = call(script.main, *command, "--resume_from_checkpoint", folder / "checkpoint-2")
    assert code == 0
    assert "continuing after step 2" in out
    assert checkpoints(folder / "previous-1") == ["checkpoint-4", "checkpoint-6"]
    assert log(folder) == losses
    for name, value in first.items():
        np.testing.assert_array_equal(tensors(folder, 6)[name], value, err_msg=name)

    code, out, _ = call(script.main, *command, "--overwrite_output_dir", "--seed", 4)
    assert code == 0
    assert "starting at step 0" in out
    assert checkpoints(folder / "previous-2") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert log(folder / "previous-2") == losses
    assert sorted(log(folder)) == sorted(losses)
    assert log(folder) != losses


def test_epochs_and_strategies_by_epoch_are_in_steps(call, shared, tmp_path):
    by_epoch = ["--num_train_epochs", 2, "--logging_strategy", "epoch", "--save_strategy", "epoch"]
    assert call(script.main, *trainers(shared / "latents", tmp_path / "run", *by_epoch))[0] == 0
    assert sorted(log(tmp_path / "run")) == [4, 8]
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-8"]


def test_an_epoch_may_end_with_an_evaluation(call, shared, tmp_path):
    by_epoch = ["--num_train_epochs", 2, "--evaluation_strategy", "epoch", "--held_out_samples", 16]
    assert call(script.main, *trainers(shared / "latents", tmp_path / "run", *by_epoch))[0] == 0
    assert sorted(log(tmp_path / "run", "eval_loss")) == [3, 6]


def test_a_strategy_of_no_checkpoints_saves_none(call, shared, tmp_path):
    none = ["--max_steps", 2, "--save_strategy", "no"]
    assert call(script.main, *trainers(shared / "latents", tmp_path / "run", *none))[0] == 0
    assert sorted(log(tmp_path / "run")) == [1, 2]
    assert checkpoints(tmp_path / "run") == []


def bad_steps(store, steps):
    """Return the steps, counted from 1, that hold the bad sample."""
    plan = make_plan(parse(*trainers(store, "unused", "--dry_run")).recipe())
    return [step + 1 for step in range(steps) if BAD in plan.order.global_batch(step)]


def assert_skipped(folder, told, skipped):
    lines = [line for line in told.splitlines() if "not finite" in line]
    assert len(lines) == len(skipped)
    for number, (step, line) in enumerate(zip(skipped, lines, strict=True), 1):
        assert f"not finite at step {step - 1}, samples {BAD}: skipped ({number} of {len(skipped)})" in line
    assert [step for step, loss in log(folder).items() if loss is None] == skipped
    assert log(folder, "skipped_steps") == {step: sum(bad <= step for bad in skipped) for step in range(1, 9)}
    assert json.loads((folder / "checkpoint-8" / "state.json").read_text())["skipped_steps"] == len(skipped)
    assert all(np.isfinite(value).all() for value in tensors(folder, 8).values())


def test_both_scripts_skip_the_same_steps(call, overflowing_store, tmp_path):
    skipped = bad_steps(overflowing_store, 8)
    assert len(skipped) == 2
    limit = flags(["max_steps", 8, "max_skipped_steps", 2])
    for name, main, of in (("ours", train.main, ours), ("trainer", script.main, trainers)):
        code, out, _ = call(main, *of(overflowing_store, tmp_path / name, *limit))
        assert code == 0
        assert_skipped(tmp_path / name, out, skipped)
    expected, found = tensors(tmp_path / "ours", 8), tensors(tmp_path / "trainer", 8)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("main", [train.main, script.main])
def test_one_skip_too_many_stops_both_scripts_with_the_last_checkpoint_whole(call, overflowing_store, tmp_path, main):
    from paddle_dit.checkpoint import newest_checkpoint

    fatal = bad_steps(overflowing_store, 8)[1]
    folder, of, every = tmp_path / "run", trainers if main is script.main else ours, "--save_steps"
    every = every if main is script.main else "--ckpt-every"
    code, _, err = call(main, *of(overflowing_store, folder, "--max_steps", 8, "--max_skipped_steps", 1, every, 1))
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(errors) == 1
    assert f"not finite at step {fatal - 1}, samples {BAD};" in errors[0]
    kept = newest_checkpoint(folder)
    assert kept.step == fatal - 1
    assert all(np.isfinite(value).all() for value in kept.tensors("model").values())


@pytest.mark.distributed
def test_all_ranks_skip_a_step_together(run_command, overflowing_store, tmp_path):
    skipped = bad_steps(overflowing_store, 8)
    more = flags(["max_steps", 8, "max_skipped_steps", 2])
    command = ["train_image_generation_dit_trainer.py", *trainers(overflowing_store, tmp_path / "run", *more, batch=8)]
    result = run_command(*command, processes=2, log_dir=tmp_path / "launch_log")
    told = (tmp_path / "launch_log" / "workerlog.0").read_text()
    assert result.returncode == 0, result.stdout + told
    assert_skipped(tmp_path / "run", told, skipped)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_ranks_bad_sample_stops_all_with_its_message(run_command, latent_store, tmp_path):
    np.load(latent_store / "latents-00000.npy", mmap_mode="r+")[21, 0, 0, 0] = np.nan
    command = trainers(latent_store, tmp_path / "run", "--max_steps", 8, "--save_steps", 1, batch=8)
    start = time.monotonic()
    result = run_command(
        "train_image_generation_dit_trainer.py", *command, processes=2, log_dir=tmp_path / "launch_log"
    )
    told = result.stdout + result.stderr
    assert result.returncode == 2
    assert time.monotonic() - start < 60
    assert "error: rank" in told
    assert "sample 21" in told
    assert "Traceback" not in told
    assert len(checkpoints(tmp_path / "run")) < 4  # four steps see every sample


BREAKS = """
import os
import sys
sys.path.insert(0, os.getcwd())
from paddle_dit import runtime
runtime.prepare()
from paddle_dit.data.loader import BatchLoader

take = BatchLoader.__next__
def broken(loader):
    batch = take(loader)
    if batch.step == 2 and os.environ["PADDLE_TRAINER_ID"] == "1":
        raise ZeroDivisionError("the second rank breaks")
    return batch
BatchLoader.__next__ = broken
import train_image_generation_dit_trainer
train_image_generation_dit_trainer.main()
"""


@pytest.mark.distributed
def test_a_rank_that_breaks_ends_the_others(run_command, shared, tmp_path):
    (tmp_path / "breaks.py").write_text(BREAKS)
    command = trainers(shared / "latents", tmp_path / "run", "--max_steps", 8, "--save_steps", 1, batch=8)
    start = time.monotonic()
    result = run_command(tmp_path / "breaks.py", *command, processes=2, log_dir=tmp_path / "launch_log")
    assert result.returncode != 0
    assert time.monotonic() - start < 60
    assert "ZeroDivisionError: the second rank breaks" in result.stdout + result.stderr
    assert checkpoints(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.distributed
def test_two_launchers_train_like_one_process(trained, shared, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["-N", 2, "-m", f"127.0.0.1:{port}", "-n", 1]
    command = trainers(shared / "latents", tmp_path / "run", *whole_run(), batch=8)[1:]
    nodes = [shell("train_multi_node.sh", *address, *command, cwd=tmp_path / name) for name in ("one", "two")]
    for code, output in map(finished, nodes):
        assert code == 0, output
    assert_same(trained("train.py"), tmp_path / "run", STEPS, atol=1e-5)


@pytest.mark.parametrize("name", ["train_single_node.sh", "train_multi_node.sh"])
def test_the_shell_scripts_explain_themselves(tmp_path, name):
    code, output = finished(shell(name, "-h", cwd=tmp_path))
    assert code == 0
    assert f"bash scripts/{name}" in output
    assert "-n" in output
    assert "-s" in output
    assert "#" not in output
    assert ("-N  number of machines" in output) == ("multi" in name)


@pytest.mark.parametrize("given", [[], ["-N", 2], ["-m", "127.0.0.1:6170"], ["--do_train"], ["-N"]])
def test_a_machine_without_the_others_is_refused(tmp_path, given):
    code, output = finished(shell("train_multi_node.sh", *given, cwd=tmp_path))
    assert code == 2
    assert output == "error: begin with -N NODES -m HOST:PORT; -h explains them\n"


def test_reports_go_where_they_are_asked_for(tmp_path):
    default, none = (
        parse("--output_dir", tmp_path).recipe(),
        parse("--report_to", "none", "--disable_tqdm", "true").recipe(),
    )
    elsewhere = parse("--logging_dir", tmp_path / "logs").recipe()
    assert (default.visualdl_folder, default.progress_bar) == (tmp_path / "visualdl", True)
    assert (none.visualdl_folder, none.progress_bar) == (None, False)
    assert elsewhere.visualdl_folder == tmp_path / "logs"


@pytest.mark.slow
def test_the_launching_script_takes_a_recipe_first(shared, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_config: DiT-Digits/2\nfeature_path: {shared / 'latents'}\nlogging_steps: 1\n")
    flags = ["--output_dir", tmp_path / "run", "--per_device_train_batch_size", "8", "--max_steps", "1"]
    command = ["bash", ROOT / "scripts" / "train_single_node.sh", "-n", "1", recipe, *flags]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    environment = kept | {"PADDLE_DIT_VENV": sys.prefix}
    result = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_help_shows_how_to_start_and_every_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    told = capsys.readouterr().out
    assert told.startswith("usage: ")
    assert "[recipe.yaml] --do_train [FLAGS]" in told
    assert "preview images; -1 never. (default: 5000)" in " ".join(told.split())


def test_a_recipe_that_does_not_stand_first_is_refused():
    with pytest.raises(ConfigError, match="a recipe must stand first"):
        parse("--max_steps", 3, "recipe.yaml")


def test_going_back_to_a_checkpoint_survives_a_restart(call, shared, tmp_path):
    run = tmp_path / "run"
    flags = trainers(shared / "latents", run, "--save_steps", 2)
    assert call(script.main, *flags, "--max_steps", 4)[0] == 0
    back = [*flags, "--resume_from_checkpoint", run / "checkpoint-2", "--max_steps", 6]
    assert "continuing after step 2" in call(script.main, *back)[1]
    assert (run / "previous-1" / "checkpoint-4").is_dir()
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert "continuing after step 6" in call(script.main, *back)[1]
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_damaged_newer_checkpoint_does_not_crowd_out_the_whole_ones(call, shared, tmp_path):
    run = tmp_path / "run"
    flags = trainers(shared / "latents", run, "--save_steps", 2, "--save_total_limit", 2)
    assert call(script.main, *flags, "--max_steps", 6)[0] == 0
    (run / "checkpoint-6" / "ema.safetensors").write_bytes(b"damaged")
    assert call(script.main, *flags, "--max_steps", 5)[0] == 0
    assert checkpoints(run) == ["checkpoint-4", "checkpoint-5"]
    assert (run / "previous-1" / "checkpoint-6").is_dir()
