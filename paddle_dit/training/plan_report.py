"""What ``--dry-run`` prints: the resolved recipe, and what it costs in memory and time."""

from dataclasses import replace

from paddle_dit.data.source import latent_shape_of
from paddle_dit.errors import ConfigError, nearest
from paddle_dit.training.costs import PEAK_TFLOPS, Setup, memory, seconds_per_step, train_flops
from paddle_dit.training.frozen import count_trained, flops_of, memory_of
from paddle_dit.training.plan import ImageNetLatents, Plan
from paddle_dit.training.recipe import PLANNING, TrainRecipe

_PAPER_STEPS = {"400K steps (the paper's comparisons)": 400_000, "7M steps (its XL/2)": 7_000_000}


def setup_of(plan: Plan) -> Setup:
    """Return what the planner needs to know of a plan, on GPUs."""
    recipe = plan.recipe
    return Setup(
        samples_per_micro_batch=recipe.share_of_batch(plan.ranks) // recipe.accumulation,
        ranks=plan.ranks,
        recompute_every=recipe.recompute,
        precision=recipe.precision,
        amp_level=recipe.amp_level,
        sharding=recipe.sharding,
        tensor_parallel_degree=recipe.tensor_parallel_degree,
    )


def describe(plan: Plan) -> str:
    """Return the resolved recipe and its costs, a ``name  value`` line each.

    Raises:
        ConfigError: a card that is not known, or degrees that do not fit the model.
    """
    recipe, config, setup = plan.recipe, plan.info.config, setup_of(plan)
    assumed = ", assumed: there is no data yet" if isinstance(plan.source, ImageNetLatents) else ""
    rows = {
        **{key: value for key, value in recipe.to_dict().items() if key not in ("config", *PLANNING)},
        "latents": f"{len(plan.source):,} x {list(latent_shape_of(plan.source))}{assumed}{_made(plan)}",
        **{name: value for name, value in config.to_dict().items() if name != "in_channels"},
        **_initial_rows(plan),
        "parameters": f"{config.num_parameters():,}",
        **_trained_rows(plan),
        "multiply-adds per forward": f"{config.multiply_adds() / 1e9:.4g} G per sample",
        "training cost": f"{flops_of(config, recipe.train_only) / 1e9:.4g} GFLOP per sample",
        "steps per epoch": f"{plan.order.steps_per_epoch:,}",
        "total steps": f"{plan.total_steps:,}",
        **_memory_rows(plan, setup),
        **_time_rows(plan, setup),
    }
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def _initial_rows(plan: Plan) -> dict[str, str]:
    """Return what --init-from comes to."""
    if plan.initial is None:
        return {}
    if plan.initial.tensors is None:
        return {"initial weights": f"not read: the run in {plan.recipe.output_dir} goes on"}
    return {"initial weights": "; ".join(plan.initial.notes)}


def _trained_rows(plan: Plan) -> dict[str, str]:
    trained, of = count_trained(plan.info.config, plan.recipe.train_only)
    return {"trained parameters": f"{trained:,}, {trained / of:.2%}"} if trained < of else {}


def _made(plan: Plan) -> str:
    if plan.source.kind == "moments":
        return ", drawn from their moments in each step"
    encoded = plan.recipe.data_path is not None
    return ", encoded in each step: the VAE's memory and time are not counted below" if encoded else ""


def _memory_rows(plan: Plan, setup: Setup) -> dict[str, str]:
    costs = memory_of(plan.info.config, setup, plan.recipe.train_only)
    rows = {f"{name} per card": _gib(value) for name, value in vars(costs).items()}
    for every, said in ((0, "without recomputation"), (1, "all blocks recomputed")):
        if every != setup.recompute_every:
            other = memory(plan.info.config, replace(setup, recompute_every=every))
            rows[f"activations {said}"] = _gib(other.activations)
    return {
        "cards": f"{plan.ranks}, {setup.samples_per_micro_batch} samples at once on each",
        **rows,
        "memory per card": f"{_gib(costs.total)}, and what CUDA and its libraries take",
    }


def _time_rows(plan: Plan, setup: Setup) -> dict[str, str]:
    batch = plan.recipe.global_batch_size
    tflops, said = _speed(plan.recipe)
    config, every = plan.info.config, setup.recompute_every
    frozen = flops_of(config, plan.recipe.train_only, every) / train_flops(config, every)
    seconds = frozen * seconds_per_step(config, setup, batch, tflops)
    rate = batch / seconds
    steps = {"an epoch": plan.order.steps_per_epoch, **_PAPER_STEPS, "this run": plan.total_steps}
    return {
        "assumed speed": said,
        "images/s": f"{rate:,.0f}, {rate / plan.ranks:,.0f} per card",
        **{f"time for {name}": _hours(count * seconds) for name, count in steps.items()},
    }


def _speed(recipe: TrainRecipe) -> tuple[float, str]:
    """Return the assumed TFLOP/s per card, and in words."""
    if recipe.assume_tflops is not None:
        return recipe.assume_tflops, f"{recipe.assume_tflops:g} TFLOP/s per card (--assume-tflops)"
    if recipe.gpu not in PEAK_TFLOPS:
        raise ConfigError(
            f"unknown --gpu '{recipe.gpu}'.{nearest(recipe.gpu, PEAK_TFLOPS)} Known: {', '.join(PEAK_TFLOPS)}"
        )
    tflops = recipe.assume_mfu * PEAK_TFLOPS[recipe.gpu]
    return tflops, f"{tflops:.0f} TFLOP/s per card: {recipe.assume_mfu:.0%} of a {recipe.gpu}'s dense bf16 peak"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _hours(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
