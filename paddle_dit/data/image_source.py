"""Images as a source of training samples: what a VAE is to encode in the training loop, instead of its latents."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.data.image_workers import Decoders
from paddle_dit.data.images import ImageFolder, find_images
from paddle_dit.errors import ConfigError, DataError
from paddle_dit.models.vae import VaeFiles


class ImageSource:
    """Labelled images, read as a :class:`paddle_dit.data.source.LatentSource` is, with pixels for latents.

    Attributes:
        kind: "images".
        sample_shape: ``(C, h, w)`` of the latents that the VAE makes of them.
        fingerprint: that of the folder; neither the size of the images nor the VAE is in it.

    Args:
        folder: the images.
        image_size: side of their centre crops in pixels, a multiple of the VAE's factor.
        vae: encodes them.
        decoders: read them; whoever made these closes them.
    """

    kind, has_flip = "images", True

    def __init__(self, folder: ImageFolder, image_size: int, vae: VaeFiles, decoders: Decoders):
        self._folder, self._decoders = folder, decoders
        side = image_size // vae.factor
        self.sample_shape = (vae.latent_channels, side, side)
        self.vae = vae.record(image_size)
        self.num_classes, self.label_names = folder.num_classes, folder.label_names
        self.labels, self.fingerprint = folder.labels, folder.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._folder)

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the crops of some images, uint8 ``[B, S, S, 3]``, and int64 labels ``[B]``.

        Safe to call from several threads, each of which keeps a process of the decoders busy.

        Args:
            indices: integers ``[B]``.
            flipped: booleans ``[B]``: which are mirrored.

        Raises:
            DataError: an image cannot be read; it is named.
        """
        images = self._decoders.read([self.name(index) for index in indices])
        for image in images:
            if isinstance(image, DataError):
                raise image
        pixels = np.stack(images)
        if flipped is not None:
            pixels[flipped] = pixels[flipped, :, ::-1]
        return pixels, self.labels[indices]

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return self._folder.file(index)


@dataclass(frozen=True, eq=False)
class ImageOptions:
    """How a run takes its images, those held out too.

    Attributes:
        image_size: side of the centre crops in pixels.
        vae: encodes them.
        decoders: read them.
        report: is told, in a line, what is unusual in a folder but allowed.
    """

    image_size: int
    vae: VaeFiles
    decoders: Decoders
    report: Callable[[str], None] = print

    def check_size(self, patch_size: int) -> None:
        """Raise ConfigError unless the VAE can encode the crops and a model cut their latents into patches."""
        multiple = self.vae.factor * patch_size
        if self.image_size < multiple or self.image_size % multiple:
            below = self.image_size // multiple * multiple
            fits = " or ".join(str(size) for size in (below, below + multiple) if size)
            raise ConfigError(
                f"--image-size {self.image_size} is not divisible by {multiple}, the VAE's factor {self.vae.factor} "
                f"times the model's patch size {patch_size}; choose {fits}"
            )

    def open(
        self, path: Path, *, num_classes: int | None = None, sample_shape: tuple[int, ...] | None = None
    ) -> ImageSource:
        """Open a folder of images; none is read yet.

        Args:
            path: as for :func:`paddle_dit.data.images.find_images`.
            num_classes: what the model was asked for, or None to take the data's.
            sample_shape: the model's input ``(C, h, w)``, or None for any.

        Raises:
            DataError: there are no images, or they do not fit.
        """
        source = ImageSource(find_images(path, self.report), self.image_size, self.vae, self.decoders)
        if num_classes is not None and source.num_classes != num_classes:
            raise DataError(
                f"{path} has {source.num_classes} classes, --num-classes says {num_classes}; "
                f"use --num-classes {source.num_classes} or other data"
            )
        if sample_shape is not None and tuple(sample_shape) != source.sample_shape:
            raise DataError(self._shape_message(source.sample_shape, tuple(sample_shape)))
        return source

    def _shape_message(self, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        mend = "use another VAE, or a model for these latents"
        if found[0] == wanted[0] and wanted[1] == wanted[2]:
            mend = f"use --image-size {wanted[1] * self.vae.factor}"
        return (
            f"the latents that {self.vae.name} makes of {self.image_size}-pixel images are {list(found)} but the model "
            f"takes {list(wanted)}; {mend}"
        )
