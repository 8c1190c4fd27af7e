"""From a model to an engine's folder."""

from pathlib import Path

from paddle_dit.checkpoint import fingerprint
from paddle_dit.conversion.loading import known_names
from paddle_dit.deploy.backends import Settings, find_backend
from paddle_dit.deploy.engine import PROGRAMS, EngineInfo
from paddle_dit.deploy.pipeline import SAVED
from paddle_dit.deploy.programs import build_layers
from paddle_dit.deploy.specs import program_specs
from paddle_dit.errors import DeployError
from paddle_dit.files import appears_whole
from paddle_dit.generation import Generator
from paddle_dit.models.vae import factor_of


def export(source: Generator, origin: str, output: Path, backend_name: str, settings: Settings) -> EngineInfo:
    """Write an engine's folder."""
    if output.exists():
        raise DeployError(f"{output} exists; choose another --output")
    backend, config = find_backend(backend_name), source.info.config
    specs, layers = program_specs(config), build_layers(source.model, source.vae)
    with appears_whole(output) as partial:
        (partial / PROGRAMS).mkdir(parents=True)
        for name in SAVED:
            backend.save(layers[name], specs[name], partial / PROGRAMS, name, settings)
        info = EngineInfo(
            config=config,
            label_names=known_names(source.info),
            vae={"scaling_factor": float(source.vae.config.scaling_factor), "factor": factor_of(source.vae)},
            backend=backend_name,
            precision=settings.precision,
            max_batch_size=settings.max_batch_size,
            device=settings.device,
            versions=backend.versions(),
            source={
                "path": origin,
                "weights_sha256": fingerprint(source.model),
                "vae_sha256": fingerprint(source.vae),
            },
            sampling={"sampler": "ddim"},
        )
        info.save(partial)
    return info
