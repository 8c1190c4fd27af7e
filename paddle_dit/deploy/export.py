"""From a model to an engine: in memory to be timed, or as a folder, which appears once it is proven."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle

from paddle_dit.checkpoint import fingerprint
from paddle_dit.conversion.formats import MODEL_INDEX
from paddle_dit.conversion.loading import known_names
from paddle_dit.deploy.backends import Settings, find_backend
from paddle_dit.deploy.engine import PROGRAMS, REFERENCE, SAVED, EngineInfo, check_output, scheduler
from paddle_dit.deploy.parity import check
from paddle_dit.deploy.pipeline import InferencePipeline
from paddle_dit.deploy.programs import build_layers
from paddle_dit.deploy.reference import make_reference
from paddle_dit.deploy.specs import program_specs
from paddle_dit.errors import ConfigError, ConversionError
from paddle_dit.files import appears_whole, read_json
from paddle_dit.generation import Generator
from paddle_dit.models.vae import factor_of

SAMPLERS = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "DPMSolverMultistepScheduler": "dpm-solver++"}


def build_programs(
    source: Generator, backend_name: str, names: Sequence[str], settings: Settings, folder: Path | None = None
) -> dict:
    """Return running programs of a model by name; nothing is proven of them yet.

    Args:
        source: model and VAE, in evaluation mode.
        backend_name: of :data:`~paddle_dit.deploy.backends.BACKENDS`.
        names: of :func:`~paddle_dit.deploy.specs.program_specs`.
        settings: for the backend.
        folder: for the files of a backend that has some; must exist.

    Raises:
        ConfigError: no such backend, settings that it has not here, or a model that is being trained.
        DeployError: something that it needs is missing, or a program that it cannot compile.
    """
    backend = find_backend(backend_name)
    backend.check(settings)
    if source.model.training:
        raise ConfigError(
            "the model is in training mode; call its eval() first, and its train() before training goes on"
        )
    if backend.in_memory and settings.cuda_graph:
        raise ConfigError(f"the backend '{backend_name}' replays no CUDA graphs; leave cuda_graph out")
    specs, layers = program_specs(source.info.config, settings.max_batch_size), build_layers(source.model, source.vae)
    if backend.in_memory:
        return {name: backend.wrap(layers[name], specs[name], settings) for name in names}
    for name in names:
        backend.save(layers[name], specs[name], folder, name, settings)
    return {name: backend.open(specs[name], folder, name, settings) for name in names}


def describe_engine(source: Generator, origin: str, backend_name: str, settings: Settings) -> EngineInfo:
    """Return what ``deploy.json`` will say, but for the parity.

    Raises:
        ConversionError: the source's own scheduler has another noise schedule than the one that is drawn with here.
    """
    return EngineInfo(
        config=source.info.config,
        label_names=known_names(source.info),
        vae={"scaling_factor": float(source.vae.config.scaling_factor), "factor": factor_of(source.vae)},
        backend=backend_name,
        precision=settings.precision,
        max_batch_size=settings.max_batch_size,
        device=settings.device,
        versions=find_backend(backend_name).versions(),
        source={
            "path": origin,
            "weights_sha256": fingerprint(source.model),
            "vae_sha256": fingerprint(source.vae),
        },
        sampling={"sampler": sampler_of(Path(origin)) if origin else "ddim"},
        cuda_graph=settings.cuda_graph,
    )


def sampler_of(source: Path) -> str:
    """Return the sampler of a DiTPipeline folder's scheduler, where it is one of ours; else ddim.

    Raises:
        ConversionError: its noise schedule is another.
    """
    path = source / "scheduler" / "scheduler_config.json"
    if not (source / MODEL_INDEX).is_file() or not path.is_file():
        return "ddim"
    values = read_json(path, ConversionError)
    for name, expected in {**scheduler(), "trained_betas": None}.items():
        found = values.get(name, expected)
        near = type(found) is type(expected) is float and np.isclose(found, expected)
        if found != expected and not near:
            raise ConversionError(
                f"{path} has {name} {str(found)[:40]}, and engines are made for {expected}; train with that"
            )
    solver = (values.get("algorithm_type", "dpmsolver++"), values.get("solver_order", 2))
    sampler = SAMPLERS.get(str(values.get("_class_name")), "ddim")
    return "ddim" if sampler == "dpm-solver++" and solver != ("dpmsolver++", 2) else sampler


def build_pipeline(
    source: Generator,
    backend_name: str,
    names: Sequence[str] = SAVED,
    settings: Settings | None = None,
    folder: Path | None = None,
) -> InferencePipeline:
    """Return a pipeline with programs of a backend, unproven; arguments as for :func:`build_programs`."""
    settings = settings or Settings()
    info = describe_engine(source, "", backend_name, settings)
    return InferencePipeline(info, build_programs(source, backend_name, names, settings, folder))


def export(
    source: Generator,
    origin: str,
    output: Path,
    backend_name: str,
    settings: Settings,
    report: Callable[[str], object] = lambda line: None,
) -> EngineInfo:
    """Write an engine's folder, which appears only once its figures are within their limits.

    Args:
        source: model and VAE.
        origin: the path or name that they came from; empty for a model in memory.
        output: the folder to make; must not exist, neither now nor when it is to appear.
        backend_name: one that has files.
        settings: for the backend.
        report: is told the figures, in a line each.

    Raises:
        ConfigError: no such backend, a precision that it has not here, or an output that another program made.
        ConversionError: see :func:`describe_engine`.
        DeployError: see :func:`build_programs` and :func:`~paddle_dit.deploy.parity.check`. Nothing is left.
    """
    check_output(output)
    find_backend(backend_name).check(settings)
    # A GPU's TF32 would blur the reference, and on it attention is traced as one kernel, which no compiler takes apart.
    paddle.set_device("cpu")
    info = describe_engine(source, origin, backend_name, settings)
    reference = make_reference(source, settings.max_batch_size)
    with appears_whole(output, replace=False) as partial:
        (partial / PROGRAMS).mkdir(parents=True)
        programs = build_programs(source, backend_name, SAVED, settings, partial / PROGRAMS)
        figures = check(InferencePipeline(info, programs), reference, report)
        np.savez(partial / REFERENCE, **reference)
        info = replace(info, parity=figures)
        info.save(partial)
    return info
