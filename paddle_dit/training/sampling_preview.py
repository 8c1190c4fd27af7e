"""Images while training: the same noises and classes each time, so that one can watch them become pictures."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from PIL import Image
from tqdm import tqdm

from paddle_dit.config import ModelInfo
from paddle_dit.conversion.loading import known_names
from paddle_dit.data.classes import Classes
from paddle_dit.diffusion.options import SamplingOptions, can_guide
from paddle_dit.errors import ConfigError, PaddleDiTError
from paddle_dit.files import replace_file
from paddle_dit.generation import Predictor, generate_latents
from paddle_dit.half_precision import GuardedPrecision
from paddle_dit.models.vae import decode
from paddle_dit.pictures import labelled_grid, stacked
from paddle_dit.training.encoding import load_vae_of
from paddle_dit.training.ranks import Ranks

FOLDER = "samples"
RECONSTRUCTION = "training-latents.png"


def picture_of(step: int) -> str:
    """Return the name of a step's picture in :data:`FOLDER`."""
    return f"step-{step:07d}.png"


@dataclass(frozen=True)
class PreviewOptions:
    """What a preview shows.

    Attributes:
        num_inference_steps: DDIM steps, 1 to 1000.
        guidance_scales: a row of images for each; 1 is no guidance.
        num_images: images of each row; they take the classes of :meth:`Classes.default_labels` in turn.
        seed: of the noises, 0 to 2**56 - 1.
        vae: folder or hub name of the VAE; by default the one that made the training latents.
        precision: what the VAE decodes in: "fp32", or on a GPU "bf16" or "fp16".
    """

    num_inference_steps: int = 25
    guidance_scales: tuple[float, ...] = (1.0, 4.0)
    num_images: int = 8
    seed: int = 0
    vae: str | None = None
    precision: str = "fp32"

    def __post_init__(self):
        self.sampling(1.0)  # checks steps and seed
        if not self.guidance_scales or not all(1.0 <= scale < math.inf for scale in self.guidance_scales):
            given = " ".join(map(str, self.guidance_scales)) or "none"
            raise ConfigError(f"guidance_scales must be numbers of 1 (no guidance) or more, got {given}")
        if self.num_images < 1:
            raise ConfigError(f"num_images must be 1 or more, got {self.num_images}")

    def sampling(self, guidance_scale: float, channels: int = 3) -> SamplingOptions:
        """Return how a row is drawn: by DDIM on the training schedule, guided as in the paper's figures."""
        return SamplingOptions(
            "ddim", self.num_inference_steps, guidance_scale, guidance_channels=min(3, channels), seed=self.seed
        )


class SamplingPreview:
    """Draws the previews of a run: PNGs in ``<folder>/samples``, and VisualDL's images.

    Every rank draws an equal share. Latents are small, so the main rank collects and decodes them: the others need no
    VAE. Without a VAE the run goes on without previews, after one warning.

    Args:
        info: the model's configuration, the names of its classes and the VAE that made its latents.
        options: what to draw.
        ranks: who draws; the main one decodes and writes.
        folder: the run's output folder.
        add_image: ``add_image(tag, image, step)`` takes uint8 ``[H, W, 3]``; called on the main rank alone.
        give_up: asked there before each image is decoded; when true, the preview ends without a picture.
        vae: the VAE, where it has been loaded already.
    """

    def __init__(
        self,
        info: ModelInfo,
        options: PreviewOptions,
        ranks: Ranks,
        folder: Path,
        add_image: Callable[[str, np.ndarray, int], None],
        give_up: Callable[[], bool] = lambda: False,
        vae=None,
    ):
        self.info, self.options, self.ranks = info, options, ranks
        self._folder, self._add_image, self._give_up = folder / FOLDER, add_image, give_up
        self._names = Classes(info.config.num_classes, known_names(info))
        labels = self._names.default_labels()
        self.class_labels = [labels[index % len(labels)] for index in range(options.num_images)]
        asked = tuple(dict.fromkeys(map(float, options.guidance_scales)))
        self.guidance_scales = asked if can_guide(info.config) else (1.0,)
        self._dropped = [scale for scale in asked if scale not in self.guidance_scales]
        self._vae, self._precision = vae, GuardedPrecision(options.precision, "this VAE")
        self._usable: bool | None = None  # unknown until the VAE has been tried
        self._given_up = False

    def draw(self, model, step: int, predict: Callable | None = None) -> bool:
        """Draw, and on the main rank decode, save and show; every rank must call it.

        Returns:
            on every rank, False where it was given up.

        Args:
            model: a :class:`~paddle_dit.models.dit.DiT` that carries the weights to draw with. It is in evaluation
                mode meanwhile; a training model is one again afterwards.
            step: updates made so far.
            predict: called as ``predict(x, timesteps, class_labels)`` instead of the model, where that needs more, as
                with half precision.
        """
        if not self._find_vae():
            return True
        rows = []
        with evaluating(model):
            for scale in self.guidance_scales:
                latents = self.draw_latents(predict or model, scale)
                # "guidance" in the tag would make VisualDL cut the scale off, beside the run's name.
                rows.append((f"samples/cfg {scale}", f"step {step:,}, guidance {scale}", latents, self.class_labels))
        return self._publish(picture_of(step), rows, step)

    def draw_latents(self, predict: Callable, guidance_scale: float) -> np.ndarray:
        """Return the latents of one row, float32 ``[N, C, h, w]``, on every rank; every rank must call it.

        Args:
            predict: as for :meth:`draw`.
            guidance_scale: 1 for a model that cannot be guided.
        """
        config, count, shares = self.info.config, len(self.class_labels), self.ranks.data_ranks
        # Shares are equally long, as collecting wants them: where images run out, the first ones are drawn again.
        own = (np.arange(-(-count // shares)) * shares + self.ranks.data_rank) % count
        options = self.options.sampling(guidance_scale, config.in_channels)
        labels = np.array(self.class_labels)[own]
        latents = generate_latents(Predictor(config, predict), labels, options, indices=own)
        parts = [part.numpy() for part in self.ranks.gather(paddle.to_tensor(latents))]
        shared = np.stack(parts[:: self.ranks.model_degree], axis=1)  # (share, ranks, C, h, w)
        return shared.reshape(-1, *config.sample_shape)[:count]

    def reconstruct(self, latents: np.ndarray, class_labels: Sequence[int]) -> bool:
        """Show what the VAE makes of training latents, once in a run; every rank must call it.

        Returns:
            on every rank, False where it was given up.

        Args:
            latents: float32 ``[N, C, h, w]``, N > 0, as the model is trained on them.
            class_labels: ``[N]``.
        """
        if not self._find_vae() or self.ranks.from_main(int((self._folder / RECONSTRUCTION).exists())):
            return True
        if self.info.config.num_classes == 0:  # the data's labels then mean nothing
            class_labels = [self.info.config.null_class] * len(latents)
        rows = [("samples/training latents", "training latents, decoded", latents, class_labels)]
        return self._publish(RECONSTRUCTION, rows, 0)

    def _find_vae(self) -> bool:
        """Load the VAE at the first call; return on every rank whether there is one."""
        if self._usable is None:
            if self.ranks.is_main:
                self._vae = self._vae or self._load_vae()
            self._usable = bool(self.ranks.from_main(int(self._vae is not None)))
            if self._usable and self._dropped:
                self._say("this model cannot be guided: its previews are drawn without guidance alone")
        return self._usable

    def _load_vae(self):
        try:
            return load_vae_of(self.info, self.options.vae)
        except (PaddleDiTError, ImportError) as error:
            self._say(f"warning: no preview images in this run: {error}")
            return None

    def _publish(self, name: str, rows: list[tuple], step: int) -> bool:
        """Decode and show rows of (tag, title, latents, class labels), unless it is given up."""
        self._given_up = False
        self.ranks.wait_for_main(self._decode_and_show(name, rows, step))
        return not self.ranks.from_main(int(self._given_up))

    def _decode_and_show(self, name: str, rows: list[tuple], step: int) -> Iterator[None]:
        grids = {}
        for tag, title, latents, class_labels in rows:
            images = []
            for latent in latents:  # one by one: many large images at once may not fit beside a training model
                self._given_up = self._give_up()
                if self._given_up:
                    return
                images.append(decode(self._vae, latent[None], precision=self._precision))
                yield
            grids[title] = self._show(tag, np.concatenate(images), class_labels, step)
        self._save(name, grids)

    def _show(self, tag: str, images: np.ndarray, class_labels: Sequence[int], step: int) -> Image.Image:
        """Add images to VisualDL and return their grid for a file."""
        captions = [self._names.name_of(int(label)) for label in class_labels]
        cell = max(64, images.shape[2])
        # VisualDL fits an image into a square, where a row of eight would be small.
        nearly_square = labelled_grid(images, captions, min(4, len(images)), cell)
        self._add_image(tag, np.array(nearly_square), step)
        return labelled_grid(images, captions, min(8, len(images)), cell)

    def _save(self, name: str, grids: dict[str, Image.Image]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        picture = stacked(grids)
        replace_file(self._folder / name, lambda file: picture.save(file, "PNG"))

    def _say(self, line: str) -> None:
        if self.ranks.is_main:
            tqdm.write(line, file=sys.stderr)  # above the progress bar


@contextmanager
def evaluating(model):
    """Have a model in evaluation mode within the block; a training one is one again afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
