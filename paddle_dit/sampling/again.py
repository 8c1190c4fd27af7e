"""Command lines that draw earlier images again: a record of images, read as options."""

import os
import re
import sys
from collections.abc import Sequence

from paddle_dit.cli import flags, parse
from paddle_dit.errors import ConfigError
from paddle_dit.pictures import read_record
from paddle_dit.sampling.options import SWITCHES, SampleOptions

# Of a record, what an option says. The rest is found out anew, and compared.
_OPTIONS = (
    "weights",
    "vae",
    "sampler",
    "num_inference_steps",
    "timestep_spacing",
    "eta",
    "guidance_scale",
    "guidance_channels",
    "guidance_interval",
    "seed",
    "precision",
    "batch_size",
    "first_index",
    "class_labels",
)


def parse_sample(argv: Sequence[str] | None = None, *, description: str) -> tuple[SampleOptions, dict]:
    """Return the options, and the record that ``--again`` names, or an empty one; Paddle must not be imported yet.

    Args:
        argv: the arguments, ``sys.argv[1:]`` by default.
        description: the head of ``--help``.

    Raises:
        ConfigError: options or a record that cannot be used.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(SampleOptions, argv, description=description, switches=SWITCHES)
    if options.again is None:
        return options, {}
    record = read_record(options.again)
    if not isinstance(record.get("class_labels"), list):
        raise ConfigError(f"{options.again} does not say which classes were drawn; give a PNG of those images")
    values = {name: record[name] for name in _OPTIONS if name in record} | {"ckpt": record.get("model")}
    _use_threads_of(record)
    tokens = flags(options.again, values, SampleOptions)
    return parse(SampleOptions, [*tokens, *argv], description=description, switches=SWITCHES), record


def _use_threads_of(record: dict) -> None:
    """Have as many threads as those images, unless it was said how many: the last bits depend on it."""
    environment = record.get("environment")
    threads = str(environment.get("threads")) if isinstance(environment, dict) else ""
    if re.fullmatch("[1-9][0-9]?[0-9]?", threads):
        os.environ.setdefault("OMP_NUM_THREADS", threads)
