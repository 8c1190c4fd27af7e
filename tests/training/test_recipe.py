import pytest

from paddle_dit.errors import ConfigError
from paddle_dit.training.recipe import TrainRecipe, learning_rate_at


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
        {"eval_samples": 0},
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


def test_ranks_that_share_a_model_share_its_part_of_the_batch():
    recipe = TrainRecipe(global_batch_size=16, tensor_parallel_degree=2, accumulation=2)
    assert recipe.share_of_batch(8) == 4
    with pytest.raises(ConfigError, match="2 does not divide the 3 launched ranks"):
        recipe.share_of_batch(3)
    with pytest.raises(ConfigError, match="not divisible by 16 ranks x 2 micro-batches; use a multiple of 32"):
        recipe.share_of_batch(32)
