"""Means and covariances of features in a file, as the ADM suite keeps those of its reference."""

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_dit.errors import DataError
from paddle_dit.files import replace_file

_KEYS = ("mu", "sigma", "mu_s", "sigma_s")
_ABOUT = "about"  # of files of ours: what the statistics are of
_NEGATIVE = 1e-3  # of a covariance's norm: rounding, even to half precision, moves no eigenvalue as far below zero


@dataclass(frozen=True)
class Statistics:
    """Of the features of some images.

    Attributes:
        mu: float64 ``[D]``, the mean of the pool features.
        sigma: float64 ``[D, D]``, their covariance.
        mu_s: float64 ``[S]``, of the spatial features; None where a file has none.
        sigma_s: float64 ``[S, S]``.
        about: ``count`` of images, ``image_shape``, ``features`` (as :class:`~paddle_dit.evaluation.features.Features`
            names itself), ``source``; empty for the ADM suite's files, which do not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None
    sigma_s: np.ndarray | None
    about: dict

    @property
    def sha256(self) -> str:
        """SHA-256 of the numbers, whatever file they are in."""
        arrays = [array for array in (self.mu, self.sigma, self.mu_s, self.sigma_s) if array is not None]
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def check(self, sizes: tuple[int, int], features: dict[str, str], name: str) -> None:
        """Raise DataError unless these are statistics of such features.

        Args:
            sizes: of the pool and the spatial features.
            features: what made those that they are compared with.
            name: the file, for the message.
        """
        if len(self.mu) != sizes[0] or (self.mu_s is not None and len(self.mu_s) != sizes[1]):
            found = f"{len(self.mu)} pool and {0 if self.mu_s is None else len(self.mu_s)} spatial features"
            raise DataError(
                f"{name} holds statistics of {found}, not {sizes[0]} and {sizes[1]}; choose other --features"
            )
        made = self.about.get("features", features)
        for key in ("name", "weights"):
            if made.get(key) != features[key]:
                raise DataError(
                    f"{name} holds statistics of features by {made.get('name')} ({str(made.get('weights'))[:12]}), not "
                    f"by {features['name']} ({features['weights'][:12]}); compute them anew with --save-stats"
                )


def has_statistics(path: Path) -> bool:
    """Whether an ``.npz`` holds any."""
    try:
        with zipfile.ZipFile(path) as file:
            return {"mu.npy", "sigma.npy"} <= set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_statistics(path: Path) -> Statistics:
    """Read statistics, of ours or of the ADM suite.

    Raises:
        DataError: the file is damaged, its arrays are no finite mean and covariance, or what it says of them cannot be.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in _KEYS if key in file.files}
            about = json.loads(str(file[_ABOUT])) if _ABOUT in file.files else {}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or no .npz ({error}); make or copy it again") from None
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean in arrays or covariance in arrays:
            _check_pair(arrays.get(mean), arrays.get(covariance), f"{mean} and {covariance} of {path}")
    values = {key: np.asarray(arrays[key], np.float64) if key in arrays else None for key in _KEYS}
    return Statistics(**values, about=_checked(about if isinstance(about, dict) else {}, path))


def _checked(about: dict, path: Path) -> dict:
    """Return what is known of what a file says of its statistics."""
    for key, can_be in _CAN_BE.items():
        if key in about and not can_be(about[key]):
            found = f"'{key}' is {about[key]!r:.40}"
            raise DataError(f"{path} says of its statistics that {found}; make the file anew with --save-stats")
    return {key: about[key] for key in _CAN_BE if key in about}


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_CAN_BE = {
    "count": _is_count,
    "image_shape": lambda value: isinstance(value, list) and len(value) in (2, 3) and all(map(_is_count, value)),
    "features": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "source": _is_text,
    "source_sha256": _is_text,
}


def _check_pair(mean: np.ndarray | None, covariance: np.ndarray | None, what: str) -> None:
    if mean is None or covariance is None:
        raise DataError(f"{what} are not both there; make the file anew with --save-stats")
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise DataError(
            f"{what} are {mean.dtype} and {covariance.dtype}, not floats; make the file anew with --save-stats"
        )
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise DataError(f"{what} have shapes {shapes}, not [D] and [D, D]; make the file anew with --save-stats")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{what} are NaN or infinite in places; make the file anew with --save-stats")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * max(1e-30, float(np.abs(covariance).max()))):
        raise DataError(f"{what}: the covariance is not symmetric; make the file anew with --save-stats")
    if not _is_covariance(np.asarray(covariance, np.float64)):
        raise DataError(f"{what}: the covariance has negative eigenvalues; make the file anew with --save-stats")


def _is_covariance(matrix: np.ndarray) -> bool:
    lifted = matrix + np.eye(len(matrix)) * (_NEGATIVE * np.linalg.norm(matrix) + np.finfo(np.float64).tiny)
    try:
        np.linalg.cholesky(lifted)  # a fifth of the time that the eigenvalues take
    except np.linalg.LinAlgError:
        return False
    return True


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write statistics so that :func:`read_statistics` and the ADM suite can read them."""
    arrays = {key: getattr(statistics, key) for key in _KEYS if getattr(statistics, key) is not None}
    replace_file(path, lambda file: np.savez(file, **arrays, **{_ABOUT: np.array(json.dumps(statistics.about))}))
