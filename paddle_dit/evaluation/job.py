"""One evaluation from its options to its figures, as ``scripts/evaluate.py`` runs it."""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from paddle_dit.errors import ConfigError
from paddle_dit.evaluation import report
from paddle_dit.evaluation.digit_features import DIGIT_SETS, DigitFeatures, digit_images
from paddle_dit.evaluation.features import Features
from paddle_dit.evaluation.inception_features import InceptionFeatures
from paddle_dit.evaluation.inception_weights import find_weights
from paddle_dit.evaluation.options import Options
from paddle_dit.evaluation.statistics import save_statistics
from paddle_dit.evaluation.suite import EvaluationSet, Measured, check, compare, measure, open_set
from paddle_dit.readers import read_tensors
from paddle_dit.runtime import peak_rss


def evaluate(options: Options) -> None:
    """Measure the samples and the reference, print the table, write the files.

    Raises:
        PaddleDiTError: of any kind; before anything long has begun where that can be known.
    """
    started = time.perf_counter()
    samples = open_named(options.samples, options.features, options.crop)
    reference = open_named(options.reference, options.features, options.crop) if options.reference is not None else None
    named = options.features == "digits" and str(options.samples) in DIGIT_SETS
    file = report.choose_file(
        Path("outputs") / options.samples if named else options.samples, options.output, options.overwrite
    )
    _check_sides(options, samples, reference)
    features = load_features(options.features, options.inception)
    check(samples, features, reference)
    if reference is not None:
        check(reference, features)
    both = reference is not None and samples.images is not None and reference.images is not None
    neighbours = options.neighbours if both else 0
    drawn = {} if named else report.drawn_with(options.samples)
    measured = [
        _measure(side, features, options.batch_size, neighbours, side is samples)
        for side in (samples, reference)
        if side is not None
    ]
    if options.save_stats is not None:
        options.save_stats.parent.mkdir(parents=True, exist_ok=True)
        save_statistics(options.save_stats, measured[-1].statistics)
    other = measured[1] if reference else None
    found = compare(measured[0], other, features)
    print(*report.lines(found, measured[0], other, features, drawn), sep="\n")
    file = report.write(file, found, measured[0], other, features, drawn, options.overwrite)
    if options.log_to is not None:
        report.log_to(options.log_to, found, report.step_of(drawn) if options.step is None else options.step)
    written = [str(path) for path in (file, options.save_stats, options.log_to) if path is not None]
    seconds, memory = time.perf_counter() - started, peak_rss() / 2**20
    print(f"\nwrote {', '.join(written)}; {seconds:.0f} s, peak memory {memory:,.0f} MiB")


def load_features(name: str, inception: Path | None = None) -> Features:
    """Load the network of ``--features``.

    Args:
        name: "inception" or "digits".
        inception: Inception's weights; by default the cached file, which is downloaded once.

    Raises:
        ConfigError, ConversionError: the weights are missing, cannot be downloaded, or are others.
    """
    if name == "digits":
        if inception is not None:
            raise ConfigError("--inception is for --features inception; leave one of the two out")
        return DigitFeatures()
    path, digest = find_weights(inception)
    return InceptionFeatures(read_tensors(path), digest)


def open_named(path: Path, features: str, crop: int | None = None) -> EvaluationSet:
    """Open a folder or file, or, for digits' features, the embedded digits by their names.

    Args:
        path: as for :func:`~paddle_dit.evaluation.suite.open_set`, or ``digits-train``, or ``digits-heldout``.
        features: "inception" or "digits".
        crop: as for ``open_set``.

    Raises:
        ConfigError: digits are not for other features.
        DataError: as ``open_set``, or the images are an unfinished set.
    """
    name = str(path)
    if name in DIGIT_SETS and not path.exists():
        if features != "digits":
            raise ConfigError(f"{name} are 8 x 8 digits; add --features digits")
        return EvaluationSet(name, digit_images(name))
    found = open_set(path, crop)
    if found.images is not None:
        report.check_drawn(path, len(found.images))
    return found


def _check_sides(options: Options, samples: EvaluationSet, reference: EvaluationSet | None) -> None:
    if reference is None and samples.images is None:
        raise ConfigError(f"{samples.name} holds statistics alone; give a REFERENCE to compare them with")
    paths = [path for path in (options.samples, options.reference) if path is not None]
    if options.crop is not None and not any(path.is_dir() for path in paths):
        raise ConfigError(f"--crop is for folders, not for {' or '.join(map(str, paths))}; leave it out")


def _measure(side: EvaluationSet, features: Features, batch_size: int | None, neighbours: int, score: bool) -> Measured:
    quiet, total = not sys.stderr.isatty(), len(side.images) if side.images is not None else 0
    with tqdm(
        total=total,
        desc=side.name[-24:],
        unit=" images",
        disable=side.images is None,
        dynamic_ncols=not quiet,
        mininterval=10.0 if quiet else 0.2,
    ) as bar:
        return measure(side, features, batch_size=batch_size, neighbours=neighbours, score=score, report=bar.update)
