"""Weights in and out: our checkpoints, and what other programs write and read. Names are imported on first use."""

from importlib import import_module

_LAZY = {
    "exact_frequencies": "paddle_dit.conversion.ppdiffusers_pipeline",
    "load_model": "paddle_dit.conversion.loading",
    "read_weights": "paddle_dit.conversion.loading",
    "read_pipeline": "paddle_dit.conversion.ppdiffusers_pipeline",
    "write_pipeline": "paddle_dit.conversion.ppdiffusers_pipeline",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str):
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
