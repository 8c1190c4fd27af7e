"""The quickstart's five stages, each through the same commands and functions that a user has."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from paddle_dit.data.digits import DIGIT_NAMES, DIGITS_VAE_FOLDER, as_digits, enlarge, load_digits
from paddle_dit.data.store import StoreWriter
from paddle_dit.diffusion.options import SamplingOptions
from paddle_dit.errors import ConfigError, PaddleDiTError
from paddle_dit.evaluation.digit_features import digit_figures
from paddle_dit.evaluation.digits import Verdict, judge
from paddle_dit.evaluation.metrics import NEIGHBOUR
from paddle_dit.files import write_json
from paddle_dit.generation import draw_images, load_generator
from paddle_dit.models.vae import encode, load_vae
from paddle_dit.pictures import labelled_grid, log_lines, loss_curve
from paddle_dit.training.monitor import LOG

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SIZE = 32
SAMPLING = SamplingOptions(sampler="ddim", num_inference_steps=50, guidance_scale=2.0, guidance_channels=4)
PER_CLASS = 10  # digits of each class in the picture


@dataclass
class Quickstart:
    """One quickstart, writing into ``output``."""

    output: Path
    processes: int | None = None
    max_steps: int | None = None
    num_samples: int = 500
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Run all stages, write the report and print the verdict; ConfigError for too few samples to judge."""
        if self.num_samples <= NEIGHBOUR:
            raise ConfigError(f"--num-samples must be {NEIGHBOUR + 1} or more, got {self.num_samples}")
        self.output.mkdir(parents=True, exist_ok=True)
        # Children start in the project's folder, so a relative path must mean the same there as here.
        self.output = _shortest(self.output)
        self.processes = self.processes or _default_processes()
        with self._stage("total", ""):
            with self._stage("encode", "[1/5] encode the digits, 1,497 to train on and 300 held out"):
                self.encode()
            with self._stage("train", f"[2/5] train on {self.processes} processes"):
                self.train()
            with self._stage("convert", "[3/5] convert to a DiTPipeline folder"):
                self.convert()
            with self._stage("pipeline", "[4/5] draw 10 x 10 digits with the stock DiTPipeline"):
                self.draw_picture()
            with self._stage("judge", f"[5/5] draw {self.num_samples} digits and judge them"):
                verdict, figures = self.judge()
        self.report(verdict, figures)

    @contextmanager
    def _stage(self, name: str, title: str) -> Iterator[None]:
        started = time.perf_counter()
        if title:
            print(f"\n{title}", flush=True)
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def encode(self) -> None:
        """Write the training digits, and the held-out ones, as packed stores of latents."""
        vae = load_vae(str(DIGITS_VAE_FOLDER))
        for split, name in (("train", "latents"), ("heldout", "heldout")):
            write_digits(self.output / name, split, vae)

    def train(self) -> None:
        """Train with the launcher, as a user would."""
        command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(self.processes)]
        command += ["--log_dir", str(self.output / "launch_log"), str(ROOT / "train.py")]
        command += ["-c", str(ROOT / "configs" / "train-digits.yaml"), "--feature-path", str(self.output / "latents")]
        command += ["--eval-path", str(self.output / "heldout")]
        command += ["--output-dir", str(self.output / "run"), "--global-seed", str(self.seed), "--no-resume"]
        if self.max_steps is not None:
            command += ["--max-steps", str(self.max_steps)]
        run_command(command, "training")
        loss_curve(self.output / "run" / LOG, self.output / "loss.png")

    def convert(self) -> None:
        """Package the EMA weights as a DiTPipeline folder."""
        command = [sys.executable, str(ROOT / "scripts" / "convert_dit_to_ppdiffusers.py"), "--overwrite"]
        command += ["--checkpoint", str(self.output / "run"), "--vae", str(DIGITS_VAE_FOLDER)]
        run_command([*command, "--output", str(self.output / "pipeline")], "the conversion")

    def draw_picture(self) -> None:
        """Draw ten digits of each class with ppdiffusers' own pipeline and save the grid."""
        import paddle
        from ppdiffusers import DiTPipeline

        pipe = DiTPipeline.from_pretrained(str(self.output / "pipeline"))
        paddle.seed(self.seed)
        labels = [label for label in DIGIT_NAMES for _ in range(PER_CLASS)]
        images = pipe(
            class_labels=labels,
            num_inference_steps=SAMPLING.num_inference_steps,
            guidance_scale=SAMPLING.guidance_scale,
            output_type="numpy",
        ).images
        images = np.round(images * 255).astype(np.uint8)
        captions = [DIGIT_NAMES[label] for label in labels]
        labelled_grid(images, captions, columns=PER_CLASS, cell=64).save(self.output / "samples.png")

    def judge(self) -> tuple[Verdict, dict[str, float]]:
        """Draw with our own sampler, ask the judge, and compute the figures by which images are compared."""
        images, labels = draw_digits(self.output / "pipeline", self.num_samples, self.seed)
        return judge(as_digits(images), labels), digit_figures(images)

    def report(self, verdict: Verdict, figures: dict[str, float]) -> None:
        """Write ``report.json`` and print the verdict."""
        heldout = digit_figures(load_digits("heldout")[0])
        log = log_lines(self.output / "run" / LOG)
        rate = float(np.median([line["images_per_second"] for line in log]))
        values = {
            **asdict(verdict),
            "digit_features": {"generated": figures, "real_heldout": heldout},
            "images_per_second": round(rate, 1),
            "final_loss": log[-1]["loss"],
            "sampling": SAMPLING.to_dict(),
            "seed": self.seed,
            "seconds": self.seconds,
        }
        write_json(self.output / "report.json", values)
        told = {"verdict": verdict, "figures": figures, "heldout": heldout, "rate": rate, "seconds": self.seconds}
        print(_VERDICT.format(**told, stages=self._stages(), output=self.output))

    def _stages(self) -> str:
        return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items() if name != "total")


def draw_and_judge(model: Path, num_samples: int, seed: int = 0) -> Verdict:
    """Draw digits of all classes in turn and ask the judge what they are; arguments as of :func:`draw_digits`."""
    images, labels = draw_digits(model, num_samples, seed)
    return judge(as_digits(images), labels)


def draw_digits(
    model: Path, num_samples: int, seed: int = 0, num_classes: int = len(DIGIT_NAMES)
) -> tuple[np.ndarray, np.ndarray]:
    """Draw digits of the first ``num_classes`` classes in turn.

    Args:
        model: as for :func:`paddle_dit.generation.load_generator`.
        num_samples: how many to draw.
        seed: of the noise.
        num_classes: how many classes the model has.

    Returns:
        uint8 ``[N, 32, 32, 3]``, and what was asked for, int64 ``[N]``.
    """
    labels = np.arange(num_samples) % num_classes
    options = SamplingOptions(**{**SAMPLING.to_dict(), "seed": seed})
    return draw_images(load_generator(model), labels, options, batch_size=100), labels


def write_digits(folder: Path, split: str, vae) -> None:
    """Write one split of the digits as a packed store of latents."""
    images, labels = load_digits(split)
    latents = encode(vae, enlarge(images, IMAGE_SIZE))
    identity = {
        "name": str(DIGITS_VAE_FOLDER.relative_to(ROOT)),
        "scaling_factor": float(vae.config.scaling_factor),
        "image_size": IMAGE_SIZE,
    }
    with StoreWriter(
        folder,
        sample_shape=latents.shape[1:],
        dtype="float32",
        num_classes=len(DIGIT_NAMES),
        label_names=DIGIT_NAMES,
        vae=identity,
        source=f"the embedded handwritten digits, split '{split}'",
        overwrite=True,
    ) as store:
        store.append(latents, labels)
    print(f"{len(labels):,} latents {list(latents.shape[1:])}, deviation {latents.std():.2f}")


_VERDICT = """
Verdict
  {verdict.generated_accuracy:.1%} of {verdict.num_samples} generated digits are labelled as asked by a classifier\
 fitted to real digits
  {verdict.real_heldout_accuracy:.1%} is its score on the 300 held-out real digits
  distance to the nearest training digit: generated {verdict.nearest_distance_generated:.1f},\
 held-out real {verdict.nearest_distance_heldout:.1f}  (far smaller would mean copies)
  precision {verdict.precision:.2f}, recall {verdict.recall:.2f}
  by the features of a digit classifier: FID {figures[fid]:.2f} (held-out real {heldout[fid]:.2f}),\
 Inception Score {figures[inception_score]:.2f} ({heldout[inception_score]:.2f}),\
 precision {figures[precision]:.2f} ({heldout[precision]:.2f}), recall {figures[recall]:.2f} ({heldout[recall]:.2f})
  trained at {rate:.0f} images/s; {stages}; {seconds[total]:.0f} s in all

  {output}/samples.png    look at it
  {output}/loss.png       the loss while training
  {output}/report.json    these figures
  {output}/pipeline       DiTPipeline.from_pretrained("{output}/pipeline")
  {output}/run            checkpoints, log.jsonl, VisualDL, samples drawn while training

Try next
  python scripts/sample.py --model {output}/pipeline --class-labels three seven 8 --guidance-scale 1.5\
 --output outputs/my-digits
  visualdl --logdir {output}/run/visualdl
  python train.py --model DiT-XL/2 --feature-path {output}/latents --dry-run
"""


def _default_processes() -> int:
    """Two processes show data parallelism; two on one GPU would not start."""
    import paddle

    return min(2, paddle.device.cuda.device_count()) if paddle.is_compiled_with_cuda() else 2


def _shortest(path: Path) -> Path:
    """Return a path relative to the project's folder if it is inside, else an absolute one."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) and Path.cwd() == ROOT else path


def run_command(command: list[str], what: str) -> None:
    """Run a command of this project; its own message says what went wrong."""
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise PaddleDiTError(f"{what} failed with exit code {code}; its output above says why")
