"""Draw many images to evaluate a model by, with as many processes as there are GPUs or cores.

    python -m paddle.distributed.launch --nproc_per_node 8 scripts/sample_ddp.py --ckpt results --vae mse \\
        --num-fid-samples 50000 --per-proc-batch-size 32 --cfg-scale 1.5 --sample-dir samples

Writes PNG files and samples.npz, as the ADM suite reads it, and samples.json with all settings. Each process draws
whole batches, on the CPU with one thread, so start as many as there are cores. The same command, on any number of
processes, continues what was stopped (Ctrl-C, exit code 75) or killed, and the result has the same bytes.
"""

import os
import sys

from tqdm import tqdm

from paddle_dit import runtime
from paddle_dit.cli import parse
from paddle_dit.errors import entry_point
from paddle_dit.sampling.options import SWITCHES, ManyOptions

THREADS = 1  # matrix kernels add up in another order with another number of threads, which changes the last bits


def _draw(job, stop) -> None:
    """Draw, and on rank 0 say what came of it."""
    from paddle_dit.generation import image_bar
    from paddle_dit.sampling.drawing import closing_line

    with job:
        job.begin(stop)
        if job.done == job.total or not job.is_main:
            job.run(stop=stop)
            if job.is_main:
                print(f"{job.work.folder}: all {job.total:,} images are there, as they were written")
            return
        if job.done:
            print(f"{job.done:,} of {job.total:,} images are done already", flush=True)
        with image_bar(job.total, job.done) as bar:
            job.run(bar.update, stop)
            bar.update(job.total - bar.n)  # which its parts miss by their rounding
        print(closing_line(job.work.folder, job.total - job.done, job.seconds))


@entry_point
def main() -> None:
    """Parse, draw, end with 75 where a signal asked for it."""
    options = parse(ManyOptions, description=__doc__, switches=SWITCHES)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    runtime.prepare()
    from paddle_dit.meeting import StoppedError
    from paddle_dit.sampling.many import ManyImages
    from paddle_dit.training.signals import STOPPED, StopSignals

    job = ManyImages(options, report=tqdm.write)  # its imports would take the signals back from us
    with StopSignals() as signals:
        try:
            _draw(job, lambda: signals.received)
        except StoppedError:
            print("stopped; finished batches are kept, the same command continues", file=sys.stderr)
            sys.exit(STOPPED)


if __name__ == "__main__":
    main()
