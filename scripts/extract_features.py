"""Encode labelled images into latents to train on, with as many processes as there are GPUs or cores.

    python -m paddle.distributed.launch --nproc_per_node 8 scripts/extract_features.py \\
        --data-path imagenet/train --features-path data/imagenet256 --image-size 256 --vae stabilityai/sd-vae-ft-mse
    python scripts/extract_features.py --data-path pictures --features-path data/pictures --on-error skip

Images are a folder per class (ImageNet's get their names), or any folders with a labels.csv. They are cropped as the
paper's code does it. Each process reads and encodes whole files of the store; on the CPU with one thread, so start as
many processes as there are cores. The same command, on any number of processes, continues what was stopped (Ctrl-C,
exit code 75) or killed, and the result has the same bytes. At the end, look at preview.png in FEATURES_PATH.
"""

import os
import sys

from tqdm import tqdm

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point
from paddle_dit.extraction.options import THREADS, ExtractionOptions


def _bar(title: str, total: int, done: int) -> tqdm:
    quiet = not sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=" images",
        smoothing=0,  # the mean: shards of other processes come all at once
        mininterval=10.0 if quiet else 0.2,
    )


def _extract(job, stop) -> None:
    """Extract, and on rank 0 say what came of it."""
    from paddle_dit.extraction.summary import PREVIEW, count_lines, figure_lines

    with job:
        job.begin(stop)
        if not job.is_main:
            job.run(stop=stop)
            return
        if job.done:
            print(f"{job.done:,} of {job.total:,} images are done already", flush=True)
        with _bar("encode", job.total, job.done) as bar:
            result = job.run(bar.update, stop)
        if job.seconds:
            print(f"this process waited for images {job.waited / job.seconds:.1%} of its time")
        lines = count_lines(result.store)
        if result.summary is not None:
            lines += figure_lines(result.store, result.summary)
        skipped = result.store.index["skipped"]
        if skipped:
            lines.append(f"skipped {len(skipped):,} images that cannot be read: {', '.join(skipped)}")
        print(*lines, f"{result.store.folder} is whole; see {result.store.folder / PREVIEW}", sep="\n", flush=True)


def _write_pairs(options: ExtractionOptions, stop) -> None:
    """Write the finished store as npy pairs."""
    from paddle_dit.data.unpacking import Unpacking
    from paddle_dit.meeting import StoppedError

    def advance(amount: int) -> None:
        bar.update(amount)
        if stop():
            raise StoppedError

    with (
        Unpacking(options.folder, options.features_path, "imagenet256", options.stored_dtype) as job,
        _bar("npy pairs", job.total, job.done) as bar,
    ):
        pairs = job.run(advance)
    print(f"{options.features_path} holds {len(pairs):,} npy pairs; {options.folder} may be removed")


@entry_point
def main() -> None:
    """Parse, extract, end with 75 where a signal asked for it."""
    options = parse(ExtractionOptions, description=__doc__)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    runtime.prepare()
    from paddle_dit.extraction.job import Extraction
    from paddle_dit.meeting import StoppedError
    from paddle_dit.training.signals import STOPPED, StopSignals

    job = Extraction(options, report=tqdm.write)  # its imports would take the signals back from us
    with StopSignals() as signals:
        try:
            _extract(job, lambda: signals.received)
            if options.format == "npy" and job.is_main:
                _write_pairs(options, lambda: signals.received)
        except StoppedError:
            print("stopped; finished shards are kept, the same command continues", file=sys.stderr)
            sys.exit(STOPPED)


if __name__ == "__main__":
    main()
