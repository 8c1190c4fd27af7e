import json
from pathlib import Path

import numpy as np
import pytest

from paddle_dit.cli import parse
from paddle_dit.data.source import open_source
from paddle_dit.data.store import StoreWriter
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.training.learning_rate import learning_rate_at
from paddle_dit.training.plan import make_plan
from paddle_dit.training.recipe import TrainRecipe


def test_the_defaults_are_the_papers_recipe():
    recipe = TrainRecipe()
    assert {
        "model": recipe.model,
        "global_batch_size": recipe.global_batch_size,
        "learning_rate": recipe.learning_rate,
        "lr_schedule": recipe.lr_schedule,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_betas": recipe.adam_betas,
        "max_grad_norm": recipe.max_grad_norm,
        "ema_decay": recipe.ema_decay,
        "class_dropout_prob": recipe.class_dropout_prob,
        "learn_sigma": recipe.learn_sigma,
        "epochs": recipe.epochs,
    } == {
        "model": "DiT-XL/2",
        "global_batch_size": 256,
        "learning_rate": 1e-4,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_betas": (0.9, 0.999),
        "max_grad_norm": -1.0,
        "ema_decay": 0.9999,
        "class_dropout_prob": 0.1,
        "learn_sigma": True,
        "epochs": 1400,
    }


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0])],
)
def test_the_learning_rate_rises_then_falls(schedule, expected):
    recipe = TrainRecipe(learning_rate=1.0, lr_schedule=schedule, warmup_steps=10)
    rates = [learning_rate_at(recipe, step, 110) for step in (5, 10, 60, 110)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "change",
    [{"max_steps": 0}, {"global_batch_size": 0}, {"ema_decay": 1.0}, {"learning_rate": 0.0}, {"global_seed": -1}],
)
def test_useless_values_are_refused(change):
    with pytest.raises(ConfigError, match="--" + next(iter(change)).replace("_", "-")):
        TrainRecipe(**change).check()


def test_a_batch_must_divide():
    assert TrainRecipe(global_batch_size=16).share_of_batch(8) == 2
    with pytest.raises(ConfigError, match="not divisible by 3 ranks"):
        TrainRecipe(global_batch_size=16).share_of_batch(3)


@pytest.mark.parametrize(
    "change",
    [
        {"eval_steps": 0},
        {"held_out_samples": 0},
        {"image_logging_steps": 0},
        {"save_total_limit": 0},
        {"max_skipped_steps": -1},
        {"tensor_parallel_degree": 0},
        {"recompute": -1},
        {"cards": 0},
        {"assume_mfu": 0.0},
        {"sharding": "stage1", "tensor_parallel_degree": 2},
    ],
)
def test_what_belongs_to_larger_runs_is_checked_too(change):
    with pytest.raises(ConfigError, match="--" + next(iter(change)).replace("_", "-")):
        TrainRecipe(**change).check()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"eval_every": -1}, "--eval-every must be 0 or more"),
        ({"eval_every": 5}, "give --eval-reference"),
        ({"eval_every": 5, "eval_samples": 3}, "--eval-samples must be 4 or more"),
        ({"eval_every": 5, "eval_samples": 10**9}, "--eval-samples must be 4 or more, and below"),
        ({"eval_every": 5, "eval_inference_steps": 1001}, "--eval-inference-steps must be 1 to 1000"),
        ({"eval_every": 5, "eval_guidance_scale": 0.5}, "--eval-guidance-scale must be 1"),
        ({"eval_every": 5, "eval_features": "digits", "inception": Path("w.pth")}, "leave one of the two out"),
        ({"eval_sampler": "dpm"}, "--eval-sampler must be one of"),
        ({"eval_features": "vgg"}, "--eval-features must be one of"),
        ({"eval_steps": 5, "eval_samples": 16}, "are --held-out-samples"),
    ],
)
def test_drawn_images_that_cannot_be_evaluated_are_refused(change, told):
    reference = {} if "reference" in told else {"eval_reference": Path("real")}
    with pytest.raises(ConfigError, match=told):
        TrainRecipe(**change, **reference).check()


def test_ranks_that_share_a_model_share_its_part_of_the_batch():
    recipe = TrainRecipe(global_batch_size=16, tensor_parallel_degree=2, accumulation=2)
    assert recipe.share_of_batch(8) == 4
    with pytest.raises(ConfigError, match="2 does not divide the 3 launched ranks"):
        recipe.share_of_batch(3)
    with pytest.raises(ConfigError, match="not divisible by 16 ranks x 2 micro-batches; use a multiple of 32"):
        recipe.share_of_batch(32)


@pytest.mark.parametrize(
    ("text", "flags", "folders"),
    [
        ("feature_path: a/b", [], ["a/b"]),
        ("feature_path: [a, b]", [], ["a", "b"]),
        ("feature_path: [a, b]", ["--feature-path", "c"], ["c"]),
        ("feature_path: a", ["--feature-path", "b", "c", "--seed-of-none"], None),
        ("max_steps: 1", ["--feature_path=a"], ["a"]),
        ("max_steps: 1", ["--feature-path", "a", "b"], ["a", "b"]),
    ],
)
def test_folders_are_one_or_several_in_recipes_and_flags(tmp_path, text, flags, folders):
    (tmp_path / "recipe.yaml").write_text(text)
    argv = ["-c", str(tmp_path / "recipe.yaml"), *flags]
    if folders is None:
        with pytest.raises(ConfigError, match="unknown option"):
            parse(TrainRecipe, argv, description="")
    else:
        assert parse(TrainRecipe, argv, description="").feature_path == tuple(map(Path, folders))


def test_one_folder_is_recorded_as_before_so_that_former_runs_continue_without_a_word():
    recorded = TrainRecipe(feature_path=Path("a")).to_dict()
    assert recorded == TrainRecipe(feature_path=(Path("a"),)).to_dict()
    assert (recorded["feature_path"], recorded["class_subset"]) == ("a", None)
    recorded = TrainRecipe(feature_path=(Path("a"), Path("b")), class_subset=("1", "cat")).to_dict()
    assert json.loads(json.dumps(recorded["feature_path"])) == ["a", "b"]
    assert recorded["class_subset"] == ["1", "cat"]


def test_no_folder_is_refused():
    with pytest.raises(ConfigError, match="--feature-path names no folder"):
        TrainRecipe(feature_path=()).check()


def plan_for(folders, **options):
    return make_plan(
        TrainRecipe(model="DiT-Digits/2", feature_path=folders, global_batch_size=8, dry_run=True, **options)
    )


def test_a_run_on_one_folder_has_the_identity_it_always_had(latent_store):
    fingerprint = open_source(latent_store).fingerprint
    plan = plan_for((latent_store,))
    assert plan.identity == {
        "model": plan.info.config.to_dict(),
        "data": fingerprint,
        "global_batch_size": 8,
        "global_seed": 0,
    }
    assert plan_for((latent_store,), eval_steps=1, held_out_samples=9).identity == plan.identity | {
        "held_out_samples": 9
    }


def test_several_folders_and_chosen_classes_make_a_plan(latent_store):
    plan = plan_for((latent_store, latent_store))
    assert (len(plan.source), plan.order.steps_per_epoch, plan.info.config.num_classes) == (128, 16, 10)
    assert plan.sample_names(np.array([3, 70])) == f"3 of {latent_store}, 6 of {latent_store}"
    assert plan.identity["data"] != plan_for((latent_store,)).identity["data"]
    chosen = plan_for((latent_store,), class_subset=("7", "class 2"), eval_steps=1, eval_path=latent_store)
    assert (len(chosen.source), len(chosen.validation), chosen.info.config.num_classes) == (13, 13, 2)
    assert chosen.info.label_names == {0: "class 2", 1: "class 7"}
    assert set(chosen.validation.gather(np.arange(13))[1]) == {0, 1}
    assert chosen.sample_names(np.arange(3)) == "2, 7, 12"
    assert "held_out_samples" not in chosen.identity
    assert chosen.identity["data"] == f"{open_source(latent_store).fingerprint}/classes 2, 7 of 10"
    held_out = plan_for((latent_store,), class_subset=("7", "2"), eval_steps=1, held_out_samples=3)
    assert held_out.identity == chosen.identity | {"held_out_samples": 3}


def test_the_folder_at_fault_is_named(latent_store, tmp_path):
    with StoreWriter(
        tmp_path / "moments", sample_shape=(4, 8, 8), num_classes=10, kind="moments", vae={"scaling_factor": 1.0}
    ) as writer:
        writer.append(np.zeros((8, 4, 8, 8)), np.arange(8))
    with pytest.raises(DataError, match=r"moments cannot be joined with .*latents: another kind"):
        plan_for((latent_store, tmp_path / "moments"))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        plan_for((latent_store, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"--image-size 256 but the latents in .*latents, .*latents are"):
        plan_for((latent_store, latent_store), image_size=256)


def test_a_dry_run_without_data_counts_the_chosen_classes(tmp_path):
    assert plan_for((tmp_path / "nowhere",), class_subset=("1", "2", "3")).info.config.num_classes == 3
