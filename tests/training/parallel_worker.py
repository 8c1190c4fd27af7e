"""What one rank does in test_parallel.py: ``parallel_worker.py DEGREE FOLDER``. The test makes the same steps alone."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_dit import runtime

runtime.prepare()

from paddle_dit.config import DiTConfig  # noqa: E402
from paddle_dit.diffusion.objective import GaussianDiffusion  # noqa: E402
from paddle_dit.generation import SamplingOptions, generate_latents  # noqa: E402
from paddle_dit.models.dit import DiT  # noqa: E402
from paddle_dit.training.data_parallel import DataParallel  # noqa: E402
from paddle_dit.training.ema import ExponentialMovingAverage  # noqa: E402
from paddle_dit.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer  # noqa: E402
from paddle_dit.training.parallel import TensorParallel, local  # noqa: E402
from paddle_dit.training.ranks import Ranks  # noqa: E402
from paddle_dit.training.recipe import TrainRecipe  # noqa: E402
from paddle_dit.training.step import TrainingStep  # noqa: E402

CONFIG = DiTConfig(sample_size=8, patch_size=2, hidden_size=48, depth=2, num_heads=4, num_classes=10)
CLIPPED, FREE = 0.05, -1.0  # at the first, every step is clipped
STEPS, SAMPLES = 5, 8


class Run:
    """A few steps of a small model with random weights, shared among ranks or not."""

    def __init__(self, accumulation: int, max_grad_norm: float, ranks: Ranks | None = None, recompute: int = 0):
        self.parallel = TensorParallel(ranks) if ranks else DataParallel()
        self.model = DiT(CONFIG, recompute_every=recompute)
        random = np.random.default_rng(1)
        for weight in self.model.parameters():  # the initial zeros would hide errors
            weight.set_value(random.standard_normal(weight.shape).astype(np.float32) * 0.1)
        self.parallel.shard_model(self.model)
        self.optimizer = build_optimizer(TrainRecipe(learning_rate=1e-4, max_grad_norm=max_grad_norm), self.model)
        self.ema = ExponentialMovingAverage(self.model, decay=0.9)
        self.step = TrainingStep(
            self.model, GaussianDiffusion(), self.optimizer, self.ema, self.parallel, seed=0, accumulation=accumulation
        )

    def advance(self, number: int) -> float:
        """Make one update and return the loss of the global batch."""
        random = np.random.default_rng(number)
        latents = random.standard_normal((SAMPLES, *CONFIG.sample_shape)).astype(np.float32)
        labels = random.integers(0, 10, SAMPLES)
        ranks = self.parallel.ranks
        mine = np.array_split(np.arange(SAMPLES), ranks.data_ranks)[ranks.data_rank]
        losses = self.step.backward(number, latents[mine], labels[mine], mine)
        if isinstance(self.parallel, TensorParallel):
            assert all(weight.grad.placements == weight.placements for weight in self.model.parameters())
        self.step.update(number)
        return float(losses["loss"])

    def drawn(self, row: int) -> np.ndarray:
        """Return images drawn from ordinary tensors, other ones in each row of ranks, as previews are."""
        options = SamplingOptions("ddim", num_inference_steps=4, guidance_scale=2.0, seed=row)
        return generate_latents(self.model, [1, 3, 9], options)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return ``kind:name`` -> whole array, as a checkpoint has them."""
        full, shadows = self.parallel.full, self.ema.shadow
        kinds = {
            "model": {name: full(name, weight) for name, weight in self.model.named_parameters()},
            "ema": {name: full(name, shadow) for name, shadow in shadows.items()},
            "optimizer": optimizer_tensors(self.optimizer, self.model, full),
        }
        return {f"{kind}:{name}": array for kind, arrays in kinds.items() for name, array in arrays.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over what :meth:`arrays` returned."""
        kinds: dict = {"model": {}, "ema": {}, "optimizer": {}}
        for key, array in arrays.items():
            kind, _, name = key.partition(":")
            kinds[kind][name] = self.parallel.arranged(name, array)
        for name, weight in self.model.named_parameters():
            weight.set_value(kinds["model"][name])
        self.ema.restore(kinds["ema"])
        restore_optimizer(self.optimizer, self.model, kinds["optimizer"])


def trained(run: Run, steps=range(STEPS)) -> dict[str, np.ndarray]:
    """Return the losses of some steps and what they leave."""
    return {"losses": np.array([run.advance(number) for number in steps]), **run.arrays()}


def main() -> None:
    """Train whole and in two parts; rank 0 writes what comes out, every rank what it holds and draws."""
    ranks, folder = Ranks.join(model_degree=int(sys.argv[1])), Path(sys.argv[2])
    run = Run(1, CLIPPED, ranks)
    run.parallel.check(CONFIG)
    shapes = {name: np.array(local(weight).shape) for name, weight in run.model.named_parameters()}
    np.savez(folder / f"rank-{ranks.rank}.npz", drawn=run.drawn(ranks.data_rank), **shapes)
    results = {"start": run.arrays(), "once": trained(run)}
    results["twice"] = trained(Run(2, FREE, ranks, recompute=1))
    first, second = Run(1, CLIPPED, ranks), Run(1, CLIPPED, ranks)
    second.restore({key: array for key, array in trained(first, range(3)).items() if key != "losses"})
    results["resumed"] = trained(second, range(3, STEPS))
    if ranks.is_main:
        for name, arrays in results.items():
            np.savez(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
